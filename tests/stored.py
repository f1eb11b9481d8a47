"""Writes the folder of a hand-made run."""

from pathlib import Path

from bench.manifest import Manifest
from bench.store.run_folder import make_folder, write_manifest


def create_run(out: Path, manifest: Manifest) -> tuple[Path, Manifest]:
    """Make the folder `out/<run_id>` with its manifest; return the folder and the manifest with its digest."""
    folder = make_folder(out, manifest.run_id)
    return folder, write_manifest(folder, manifest)
