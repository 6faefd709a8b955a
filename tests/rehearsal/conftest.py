"""Order of the tests of `xtrain check`."""


def pytest_collection_modifyitems(items):
    """Put the gallery first: its children are forks, and torch_xla starts in none whose parent made a backward."""
    items.sort(key=lambda item: item.path.name != "test_gallery.py")
