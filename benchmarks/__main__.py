"""python -m benchmarks: all of them, one after the other."""

import subprocess
import sys

NAMES = ("attention", "minilm_structured", "quantized", "compile_time", "decode", "padded")

if __name__ == "__main__":
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False)
        for name in NAMES
    ]
    sys.exit(max(done.returncode for done in codes))
