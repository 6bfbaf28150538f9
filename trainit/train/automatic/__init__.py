"""What a config leaves open by "auto", chosen when the devices are known."""
