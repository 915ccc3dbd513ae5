"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave (recipe, file, command line).

    The message is one line that names the key or the file and says the mend. Commands print it and exit with code 2;
    every other exception is a defect of megacode and keeps its traceback.
    """
