"""Bounds of optimizers' fields that their names do not tell; those that names tell are in trainit/config."""

from trainit.config import require


def above_0(config, *fields: str, within: str = "optimizer"):
    """Raises ConfigError unless each field is above 0.

    Args:
        config: the sub-config.
        fields: of it.
        within: where it stands in the run's config.
    """
    for field in fields:
        require(config[field] > 0, f"{within}.{field}={config[field]} must be above 0")


def not_below_0(config, *fields: str, within: str = "optimizer"):
    """Raises ConfigError if a field is negative; arguments as above."""
    for field in fields:
        require(config[field] >= 0, f"{within}.{field}={config[field]} must not be below 0")
