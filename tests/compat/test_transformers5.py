import pytest

from tests.compat.fresh_python import run_python, write_package

CODE = (
    "import sys, mmvssm, mmpretrain.utils.dependency as d\n"
    "assert 'transformers' not in sys.modules\n"
    "print(d.WITH_MULTIMODAL, mmvssm.compat.summary())\n"
)
OLD = "from .pytorch_utils import apply_chunking_to_forward, find_pruneable_heads_and_indices, prune_linear_layer\n"


@pytest.fixture
def packages(tmp_path):
    """A fake mmpretrain that has switched its multi-modal models on."""
    return write_package(
        tmp_path,
        {
            "mmpretrain/__init__.py": "",
            "mmpretrain/utils/__init__.py": "",
            "mmpretrain/utils/dependency.py": "WITH_MULTIMODAL = True\n",
        },
    )


def test_switched_off_with_transformers_5(packages):
    write_package(packages, {"transformers/__init__.py": "", "transformers/modeling_utils.py": "class Model: ...\n"})
    out = run_python(CODE, packages)
    assert out.startswith("False mmvssm compatibility: transformers 5 (")


def test_left_on_with_transformers_4(packages):
    write_package(packages, {"transformers/__init__.py": "", "transformers/modeling_utils.py": OLD})
    assert run_python(CODE, packages).strip() == "True mmvssm compatibility: nothing active"


def test_left_alone_when_off(packages):
    write_package(packages, {"mmpretrain/utils/dependency.py": "WITH_MULTIMODAL = False\n"})
    assert run_python(CODE, packages).strip() == "False mmvssm compatibility: nothing active"
