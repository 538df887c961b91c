from tests.compat.fresh_python import run_python, write_package


def test_import_of_mmvssm_is_cheap():
    out = run_python(
        "import sys, mmvssm\n"
        "heavy = {'torch', 'torchvision', 'triton', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), mmvssm.__version__)\n"
    )
    assert out.startswith("[] 0.")


def test_action_runs_after_the_import_and_leaves_no_trace(tmp_path):
    write_package(tmp_path, {"some_library.py": "value = 1\n", "early.py": "value = 1\n"})
    out = run_python(
        "import sys, importlib\n"
        "import early\n"
        "from mmvssm.compat.import_hooks import after_import\n"
        "def add(module):\n    module.value += 1\n"
        "for name in 'some_library', 'early':\n    after_import(name, add)\n    after_import(name, add)\n"
        "assert 'some_library' not in sys.modules and early.value == 3\n"
        "import some_library\n"
        "assert some_library.value == 3\n"
        "assert type(some_library.__loader__).__name__ == 'SourceFileLoader', some_library.__loader__\n"
        "assert some_library.__spec__.loader is some_library.__loader__\n"
        "import inspect; assert 'value = 1' in inspect.getsource(some_library)\n"
        "assert importlib.reload(some_library).value == 3\n"
        "after_import('no_such_module', add)\n"
        "try:\n    import no_such_module\nexcept ModuleNotFoundError as error:\n    print(error)\n",
        tmp_path,
    )
    assert out.strip() == "No module named 'no_such_module'"


def test_installing_twice_changes_nothing():
    run_python(
        "import sys, mmvssm\nbefore = list(sys.meta_path)\nmmvssm.compat.install()\nassert sys.meta_path == before\n"
    )


def test_unknown_attribute_of_the_package():
    out = run_python("import mmvssm\ntry:\n    mmvssm.get_modle\nexcept AttributeError as error:\n    print(error)")
    assert "module 'mmvssm' has no attribute 'get_modle'" in out
