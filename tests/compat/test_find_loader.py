from tests.compat.fresh_python import run_python


def test_restored_where_python_dropped_it():
    run_python(
        "import pkgutil\n"
        "if hasattr(pkgutil, 'find_loader'):\n    del pkgutil.find_loader\n"
        "import mmvssm\n"
        "assert pkgutil.find_loader('json') is not None and pkgutil.find_loader('no_such_module') is None\n"
        "assert 'pkgutil.find_loader (restored)' in mmvssm.compat.summary()\n"
    )


def test_left_alone_where_it_exists():
    run_python(
        "import pkgutil\n"
        "pkgutil.find_loader = original = object()\n"
        "import mmvssm\n"
        "assert pkgutil.find_loader is original and 'find_loader' not in mmvssm.compat.summary()\n"
    )
