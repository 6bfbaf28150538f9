"""What changes another optimizer: `optimizer=WRAPPER+OPTIMIZER`, as in cautious+adamw.

A wrapper is one file with two functions:

    def get_config(base: ConfigDict) -> ConfigDict              # the other's, with own fields in base.WRAPPER
    def wrap(config, context, make_base) -> optax.GradientTransformation

`config` is base.WRAPPER, or None without fields, and make_base(context) makes the other optimizer.
"""
