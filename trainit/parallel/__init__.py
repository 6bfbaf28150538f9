"""How arrays and products are laid out on the mesh."""
