"""The one exception for faults in what the user brought."""


class InputError(ValueError):
    """A fault in an input (file, record, configuration), told in one clear sentence.

    Command-line programs print the message and exit with status 2; anything else that is raised is
    a defect of the program itself.
    """
