"""What the tests of models of transformers share."""

import importlib.metadata

import pytest


@pytest.fixture(scope="module")
def transformers():
    """The package. It looks for a package named kernels; our folder of that name must not be found."""
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.utils import is_kernels_available

    if not importlib.metadata.packages_distributions().get("kernels"):
        assert not is_kernels_available()
    return package
