"""The error for a file that is not what it should be."""


class AdapterFileError(ValueError):
    """A file is not what it claims to be, or is not for this model.

    Nothing from the file has been used. The message names the file and the layer.
    """
