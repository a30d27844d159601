"""The errors that a command ends with in one message instead of a traceback."""


class UserError(ValueError):
    """A problem that the user can mend; the text says what it is and the way out."""


class OptionError(UserError):
    """A wrong value or combination of options; the text names the option and the way out."""
