"""One phantom archive for all tests of searching and of the page."""

import page_service
import pytest


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The folder, and the config that a page is started with."""
    folder = tmp_path_factory.mktemp("archive")
    return folder, page_service.write_archive(folder)
