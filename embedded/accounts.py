"""Running Postgres when we are root: Postgres refuses that, so it gets an account of its own.

No directory is opened to others for it. The server reaches its data through a descriptor of the data directory that
we opened (`/proc/self/fd/N`), so the directories above may stay closed. Its programs have to be reachable by path:
where they are not (a clone under /root, for example) they are copied once to /var/cache/scrip.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedded.problems import StartupProblem

ACCOUNT_NAME = "scrip-postgres"
FALLBACK_ACCOUNT_NAME = "nobody"
PROGRAM_CACHE = Path("/var/cache/scrip")
DESCRIPTOR_DIRECTORY = Path("/proc/self/fd")


@dataclass(frozen=True)
class Account:
    """A system account by its numbers."""

    uid: int
    gid: int


def account_for(data: Path) -> Account | None:
    """Return the account that Postgres has to run as for the data directory `data`, or None for our own.

    Only root needs another account: the one that owns existing data, else `scrip-postgres`, which is made on first use
    (`nobody` where the machine does not let us make it). Raises StartupProblem when there is no way.
    """
    if os.geteuid() != 0:
        return None
    if not DESCRIPTOR_DIRECTORY.exists():
        raise StartupProblem("Postgres does not run as root on this system. Start Scrip as an ordinary user.")
    if not data.exists():
        return _new_account()
    owner = data.stat()
    if owner.st_uid == 0:
        raise StartupProblem(
            f"{data} belongs to root, and Postgres does not run as root. "
            f"Give it to another account (chown -R {FALLBACK_ACCOUNT_NAME} {data}) and start again."
        )
    return Account(owner.st_uid, owner.st_gid)


def reachable_programs(root: Path, folders: Sequence[str], version: str, account: Account | None) -> Path:
    """Return a directory below which `account` can execute what lies in `folders` below `root`: `root` if possible.

    Else it is a copy, in which the folders lie as they do below `root`, because programs find their libraries by
    relative paths. `version` names the package's version and with it the copy. Raises StartupProblem when no copy can
    be made.
    """
    if account is None or all(_open_to_all(root / folder) for folder in folders):
        return root
    copy = PROGRAM_CACHE / f"postgres-{version}"
    if copy.is_dir() and copy.stat().st_uid == 0:
        return copy
    try:
        _copy_for_all(root, folders, copy)
    except OSError as error:
        raise StartupProblem(
            f"Postgres runs under an account of its own, which cannot reach {root}, and {copy} cannot be written "
            f"({error}). Start Scrip as an ordinary user, or install it below a directory that is open to all."
        ) from error
    return copy


def _new_account() -> Account:
    if not _exists(ACCOUNT_NAME):
        _create_system_account()
    entry = pwd.getpwnam(ACCOUNT_NAME if _exists(ACCOUNT_NAME) else FALLBACK_ACCOUNT_NAME)
    return Account(entry.pw_uid, entry.pw_gid)


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _create_system_account() -> None:
    useradd = shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if useradd is None:
        return
    # A failure (read-only /etc, or somebody else makes the same account right now) is seen by looking again.
    subprocess.run(  # noqa: S603
        [useradd, "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", ACCOUNT_NAME],
        capture_output=True,
        check=False,
        timeout=30,
    )


def _open_to_all(folder: Path) -> bool:
    folder = folder.resolve()
    can_be_listed = folder.stat().st_mode & 0o005 == 0o005
    return can_be_listed and all(parent.stat().st_mode & 0o001 for parent in folder.parents)


def _copy_for_all(root: Path, folders: Sequence[str], copy: Path) -> None:
    PROGRAM_CACHE.mkdir(parents=True, exist_ok=True)
    PROGRAM_CACHE.chmod(0o755)
    scratch = Path(tempfile.mkdtemp(dir=PROGRAM_CACHE))
    try:
        for folder in folders:
            ignore = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(root / folder, scratch / "copy" / folder, symlinks=True, ignore=ignore)
        _open_tree(scratch / "copy")
        try:
            os.rename(scratch / "copy", copy)
        except OSError:
            # Another start put the same copy there first.
            if not copy.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_tree(tree: Path) -> None:
    for folder, _, names in os.walk(tree):
        Path(folder).chmod(0o755)
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
