"""What optimizers are made of: their context, fields, schedules, and the mathematics that several share."""
