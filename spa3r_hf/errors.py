"""The one error for data that cannot be used."""


class BadSampleError(ValueError):
    """A picture, video, camera file or scene that cannot be used; the message names it and what was expected.

    Training may choose to go on without such a sample; any other error is a mistake in the program or its settings.
    """
