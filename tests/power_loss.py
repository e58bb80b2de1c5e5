"""A disk that forgets what was not synced: what would be there after the power was cut, at any moment of a run.

`fsync` and `fdatasync` of a file keep its content as it is then, of a folder the names in it and which file each names.
Nothing else is there afterwards: no content that was written and not synced, no name, no rename, no removal.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class Disk:
    """What of a folder would survive.

    Parameters
    ----------
    root : Path
        The folder; what lies there already survives.
    patch : pytest.MonkeyPatch
        To see what is synced.
    cut : callable
        Called after every sync; it may call `restore`.
    """

    def __init__(self, root, patch, cut=lambda disk: None):
        self.root, self.cut, self.syncs = root, cut, 0
        self.content, self.names = {}, {}
        fsync, fdatasync = os.fsync, os.fdatasync
        for folder, _, files in os.walk(root):
            self._keep(Path(folder))
            for name in files:
                self._keep(Path(folder, name))

        def synced(descriptor, sync):
            sync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_relative_to(root):
                self._keep(path)
                self.syncs += 1
                self.cut(self)

        patch.setattr(os, "fsync", lambda descriptor: synced(descriptor, fsync))
        patch.setattr(os, "fdatasync", lambda descriptor: synced(descriptor, fdatasync))

    def _keep(self, path):
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self.content[found.st_ino] = path.read_bytes()

    def restore(self, target, also=()):
        """Write what survives to another folder; of files named in `also` all that was written, synced or not."""
        self._folder(self.root.stat().st_ino, self.root, target, also)

    def _folder(self, inode, source, target, also):
        target.mkdir(parents=True, exist_ok=True)
        for name, (number, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                self._folder(number, source / name, target / name, also)
            elif name in also and (source / name).exists():
                (target / name).write_bytes((source / name).read_bytes())
            else:
                # a name whose file was never synced: empty
                (target / name).write_bytes(self.content.get(number, b""))
