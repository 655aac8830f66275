"""The errors that programs and estimators raise; all are ValueErrors."""


class StrategyError(ValueError):
    """A gradient estimator is not legal for a random choice: its gradient would be wrong."""


class AddressError(ValueError):
    """Addresses are missing, left over or repeated, or a named choice stands where its value would be lost."""


class SupportError(ValueError):
    """A guide draws values that its model cannot take."""
