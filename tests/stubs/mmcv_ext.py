"""Stand-in for mmcv's compiled operators: importable, and clear when one is called."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv._ext.{name} is a test stub; compiled mmcv has the real one"
        )

    return missing
