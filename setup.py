"""What pyproject.toml cannot say: an editable install is found on the path, not only behind it.

setuptools finds an editable package by a hook that Python asks last. Beside a clone that is called ``xtrain``, a script
finds the folder of the clone before that, as a package without a file (a namespace), and ``import xtrain`` is empty. A
real package anywhere on the path wins over such a folder: so the checkout goes to the end of the path, too.
"""

from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
ON_PATH = "xtrain_checkout.pth"


class EditableWheel(editable_wheel):
    """Adds a line for the path to the wheel of an editable install."""

    def run(self) -> None:
        """Build the wheel, then add to it."""
        super().run()
        for wheel in Path(self.dist_dir).glob("*.editable-*.whl"):
            add_file(wheel, ON_PATH, f"{ROOT}\n".encode())


def add_file(wheel: Path, name: str, content: bytes) -> None:
    """Add a file to a wheel and to the list of its files, RECORD."""
    with ZipFile(wheel) as before:
        files = {item.filename: before.read(item) for item in before.infolist()}
    record = next(file for file in files if file.endswith(".dist-info/RECORD"))
    digest = urlsafe_b64encode(sha256(content).digest()).rstrip(b"=").decode()
    files = {name: content, **files, record: files[record] + f"{name},sha256={digest},{len(content)}\n".encode()}
    with ZipFile(wheel, "w", ZIP_DEFLATED) as after:
        for file, data in files.items():
            after.writestr(file, data)


setup(cmdclass={"editable_wheel": EditableWheel})
