"""What is handed out is whole, and a stranger gets from it to an extended model of their own."""

import tarfile
import zipfile
from pathlib import Path

import pytest
from first_hour import build, files_of_the_tree, first_hour

pytestmark = pytest.mark.slow
# Of the checkout alone: what a repository's host and its tools read.
APART = (".github/", ".gitignore", ".ci/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("handed out")


@pytest.fixture(scope="module")
def wheel(folder):
    return build(folder)


def test_the_source_archive_is_the_checkout(folder):
    with tarfile.open(build(folder, "sdist")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    # conf/ is a link in the package, which an archive holds as what it points to.
    kept = {name for name in files_of_the_tree() if not name.startswith(APART) and name != "nemo_longctx/conf"}
    assert not kept - inside


def test_the_wheel_has_its_settings_and_a_description_without_the_checkout_s_links(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    package = {name for name in files_of_the_tree() if name.startswith("nemo_longctx/") and name != "nemo_longctx/conf"}
    settings = {f"nemo_longctx/{name}" for name in files_of_the_tree() if name.startswith("conf/")}
    assert not (package | settings) - set(names)
    assert "](docs/" not in text
    assert "](CHANGELOG" not in text
    assert "nemo-longctx init" in text


@pytest.mark.timeout(1800)
def test_a_stranger_s_first_hour(wheel, tmp_path):
    seconds = first_hour(tmp_path, "llama", wheel=wheel)
    assert {"init", "import", "prepare", "train", "eval", "export", "generate", "lm_eval"} <= set(seconds)


@pytest.mark.timeout(1800)
def test_the_notebook_runs(tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(Path(__file__).parent.parent.parent / "examples" / "first_hour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert "/loss" in found
    assert "gain" in found
