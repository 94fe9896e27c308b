"""What is raised when a file is not what it should be."""


class AdapterFileError(ValueError):
    """A file that is not what it claims to be, or not for this model.

    Nothing of it has been used. The message names the file and the layer.
    """
