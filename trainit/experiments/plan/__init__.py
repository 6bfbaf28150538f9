"""What a step costs on a mesh before there is one: memory, what devices exchange, time."""
