"""What needs no model starts without torch, and every exported name is there all the same."""

import subprocess
import sys

import pytest

import llava_fast
import llava_fast.processor


@pytest.mark.parametrize(
    "module", ["llava_fast.__main__", "llava_fast.datagen.__main__", "llava_fast.evaluate.compare"]
)
def test_no_torch(module):
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("package", [llava_fast, llava_fast.processor])
def test_names(package):
    for name in package.__all__:
        assert getattr(package, name).__name__ in (name, f"{package.__name__}.{name}")
    assert set(dir(package)) >= {*package.__all__, "__name__"}
    assert not hasattr(package, "a.b")
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {package.__name__} import nothing")


def test_modules_are_found():
    program = "import llava_fast; print(llava_fast.engine.Engine is llava_fast.Engine)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
