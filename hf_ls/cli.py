"""`hf-ls finetune | compare | evaluate | completion`, and what the scripts of the same names call.

Wrong settings, data and checkpoints end with one sentence, with a traceback under `--log_level debug`. Nothing heavy is imported
before the command is known.
"""

from __future__ import annotations

import sys

from hf_ls import __version__

_COMMANDS = {
    "finetune": "fine-tune with label smoothing and see the calibration",
    "compare": "compare baseline, label smoothing and temperature scaling over seeds",
    "evaluate": "calibration of a finished model, or of predictions in a file",
    "completion": "print a script which completes all this in bash, zsh or tcsh",
}


def main() -> None:
    """`hf-ls COMMAND --setting value ...`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command == "--version":
        print(f"hf_ls {__version__}")
    elif command in ("-h", "--help"):
        print("usage: hf-ls COMMAND [--setting value ...]\n")
        print("\n".join(f"  {name:<10} {text}" for name, text in _COMMANDS.items()))
        print("\n`hf-ls COMMAND --help` shows the settings. Several processes: accelerate launch scripts/finetune.py ...")
    elif command in _COMMANDS:
        sys.argv[:2] = [f"hf-ls {command}"]
        run = {"finetune": finetune_command, "compare": compare_command, "evaluate": evaluate_command}
        (run | {"completion": completion_command})[command]()
    else:
        sys.exit(f"error: expected a command of {', '.join(_COMMANDS)}, got {command!r}; see hf-ls --help")


def finetune_command() -> None:
    """As `scripts/finetune.py`, on this process and those which were launched with it."""
    from hf_ls.common.errors import end_with, one_sentence
    from hf_ls.run.config import parse_config
    from hf_ls.run.finetune import finetune
    from hf_ls.run.launch import check_started, end_processes, explain_failure
    from hf_ls.run.stopping import Stopped, end_at_signals, end_stopped, give_signals_back

    config = None
    end_at_signals()
    try:
        check_started()
        config = parse_config()
        finetune(config)
        end_processes()
        give_signals_back()
    except Stopped as stopped:
        sys.exit(end_stopped(stopped))
    except Exception as error:
        if one_sentence(error) is None:  # of one rank alone; what hf_ls refuses, it refuses on all
            explain_failure(error)
        end_with(error, debug=config is not None and config.training.log_level == "debug")


def compare_command() -> None:
    """As `scripts/compare.py`."""
    from hf_ls.common.errors import end_with
    from hf_ls.compare.cells import CellFailed
    from hf_ls.compare.experiment import parse_compare, run_comparison

    config = None
    try:
        options, config, argv = parse_compare(sys.argv[1:])
        run_comparison(options, config, argv)
    except CellFailed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same line goes on where this one ended")
    except Exception as error:
        end_with(error, debug=config is not None and config.training.log_level == "debug")


def evaluate_command() -> None:
    """As `scripts/evaluate.py`."""
    from hf_ls.common.errors import end_with
    from hf_ls.run.evaluate import evaluate, parse_evaluation

    try:
        evaluate(parse_evaluation())
    except Exception as error:
        end_with(error)


def completion_command() -> None:
    """`hf-ls completion bash`: the completion of every command and setting, a static script, since asking would take seconds."""
    from argparse import ArgumentParser

    from hf_ls.common.errors import extra

    with extra("scripts", "hf-ls completion"):
        import shtab
    shells, shell = shtab.SUPPORTED_SHELLS, sys.argv[1] if len(sys.argv) > 1 else None
    if shell not in shells:
        sys.exit(f"error: expected a shell of {', '.join(shells)}, got {shell}; try hf-ls completion bash")

    from hf_ls.compare.experiment import comparison_parser
    from hf_ls.run.config import config_parser
    from hf_ls.run.evaluate import evaluation_parser

    parsers = {
        "finetune": [config_parser()],
        "compare": [comparison_parser(), config_parser()],
        "evaluate": [evaluation_parser()],
    }
    root = ArgumentParser(prog="hf-ls")
    commands = root.add_subparsers()
    for name, kept in parsers.items():
        commands.add_parser(name, help=_COMMANDS[name], parents=kept, add_help=False, conflict_handler="resolve")
    print(shtab.complete(root, shell))


if __name__ == "__main__":
    main()
