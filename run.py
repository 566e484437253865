"""Ask a LLaVA about pictures, offline.

    python run.py --image assets/demo.png --prompt "Describe the picture."
    python run.py --model llava-hf/llava-1.5-7b-hf --image x.png --prompt "What is this?" --stats
    python run.py --questions questions.jsonl --image-folder pictures --answers answers.jsonl --batch 8

Without --prompt, run.py starts a conversation on a terminal. If stdin is not a terminal, each line of stdin is an
independent question about the pictures of --image, and each answer is printed as one line (its line breaks become
spaces; use --json for the exact text).

Only answers go to stdout. Exit codes: 0 answered; 1 failed while running; 2 invalid input (flags, paths, pictures,
prompt, checkpoint); 130 Ctrl-C (the text so far is kept).
"""

import os
import signal
import sys
import time
from functools import partial

from model.console import as_command, as_json, explain, fail, note, one_line, say
from model.flags import OF_PROCESS, check, check_processes, choose_device, options, parser


def main(argv=None):
    """Run the command line argv (default: sys.argv[1:]) and return the exit code."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return command(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported, which starts threads
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # only a thread of `together` may get it
    ctrl_c = signal.getsignal(signal.SIGINT)
    if ctrl_c is signal.default_int_handler:  # not ignored, as in the background of a script
        signal.signal(signal.SIGINT, stop_at_once)
    try:
        from model.processes import together
    except ImportError as broken:
        code = explain(broken)
        return fail(*code) if os.environ.get("RANK") == "0" else code[1]
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    return together(partial(command, argv))


def stop_at_once(*_):
    """Ends this process at Ctrl-C while torch is imported, which can lose a KeyboardInterrupt."""
    if os.environ.get("RANK") == "0":
        fail("interrupted; nothing was written", 130)
    os._exit(130)


def command(argv, team=None):
    """`main` in one process, or in one of the processes of a `model.processes.Team`."""
    flags = parser()
    args = flags.parse_args(argv)
    try:
        if args.version:
            print(versions())
            return 0
        if args.list_methods is not None:
            from model.api import list_methods

            print(list_methods(args.list_methods, args.model))
            return 0
        check_processes(args, flags.error, team and team.size)
        check(args, flags.error)  # sets args.talk and args.lines; until here, torch is not imported
        if team:
            team.join({name: value for name, value in vars(args).items() if name not in OF_PROCESS})
        if args.questions is not None:
            from model.questions import answer_file

            return answer_file(args, team)
        return answer(args, team)
    except KeyboardInterrupt:  # while loading; `write` catches it during an answer
        return fail("interrupted" + ("; nothing was written" if args.prompt or args.questions else ""), 130)
    except BrokenPipeError:
        raise  # see `as_command`
    except Exception as broken:
        if args.debug:
            raise
        return fail(*explain(broken))


def answer(args, team=None):
    """Load, ask, print. Returns the exit code."""
    start = time.perf_counter()
    from model import Generation, open_checkpoint
    from model.image import read_frames, read_image
    from model.report import CoreWait, Meter, introduce
    from model.show import check_path

    device = choose_device(team.device(args.device) if team else args.device, args.backend, args.threads)
    pictures, frames = [read_image(path) for path in args.image], read_frames(args.frames)
    checkpoint = open_checkpoint(args.model)
    if team:
        from model.parallel import split
        from model.processes import contents

        team.divide(args.tp or team.size, device.type)
        team.same("the checkpoint", contents(checkpoint.folder))
        team.same("--dtype auto", [str(checkpoint.choose_dtype(args.dtype, device)).encode()])
        checkpoint = split(checkpoint, team.mesh["tp"])
    given = options(args, checkpoint)
    ask = partial(Generation, checkpoint, images=pictures, frames=frames, **given)
    generation = ask(args.prompt or "?")  # checks the flags; without --prompt, "?" stands for the questions to come
    if team:
        team.same("the question", [str(generation.ids).encode()])
        team.same("a picture", [picture.image.tobytes() for picture in (*pictures, *frames)])
        args.show = args.show if team.rank == 0 else None  # process 0 draws
    if args.show is not None:
        check_path(args.show, generation)
    checkpoint.read_weights(args.dtype, device)
    meter, wait = Meter(device, time.perf_counter() - start), CoreWait(device)
    introduce(args, generation)
    if args.talk:
        code = converse(args, checkpoint, given, pictures, frames, meter)
    else:
        for text in generation.notes:
            note(text)
        code = answer_lines(args, ask, meter) if args.lines else deliver(args, generation, meter)
    wait.warn()  # if other processes slowed the answer
    return code


def deliver(args, generation, meter):
    """Print the answer as it is generated, then the output of --json, --compare and --stats. Returns the exit code."""
    from model.report import report, say_comparison, say_outcome, stats
    from model.show import save

    if args.prompt and args.max_new_tokens > generation.context_left:
        note(f"the context leaves room for {generation.context_left} of {args.max_new_tokens} new tokens")
    stream = not (args.json or args.no_stream or args.lines)
    code = write(generation, stream)
    if code == 130 and not args.talk:  # a conversation prints its own message
        say("interrupted; the text so far is kept")
    took = report(generation, args.model, args.seed, meter)  # the object of --json
    say_outcome(args, generation, took, code)
    if code == 0 and args.compare:
        code = say_comparison(generation, took)
    if args.json:
        print(as_json(took), flush=True)
    elif not stream:
        print(one_line(generation.text) if args.lines else generation.text, flush=True)
    if args.stats:
        say(stats(took, meter.bandwidth(), generation))
    if args.show is not None and generation.masks is not None:  # None after Ctrl-C during the prefill
        try:
            say(save(generation, args.show))
        except OSError as broken:
            return fail(broken, 1)
    return code


def write(generation, stream):
    """Run the generation; with stream, print its text as it comes. Returns the exit code, 130 after Ctrl-C."""
    code = 0
    try:
        for piece in generation:
            if stream:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    if stream:
        print(flush=True)
    return code


def answer_lines(args, ask, meter):
    """Answer each line of stdin independently, until one fails. ask: (text) -> Generation. Returns the exit code."""
    from model import InputError
    from model.chat import command_of
    from model.report import report, say_pruned

    for number, text in args.lines:
        try:
            if command := command_of(text):
                raise InputError(f"{command} works only in a conversation on a terminal; leave the line out")
            generation = ask(text)
            code = deliver(args, generation, meter)
        except InputError as wrong:
            raise InputError(f"line {number} of stdin: {wrong}") from wrong
        if code:
            return code
    say_pruned(generation, report(generation, args.model, args.seed, meter), "last answer: ")
    return 0


def converse(args, checkpoint, given, pictures, frames, meter):
    """A conversation on the terminal. Returns the exit code."""
    from model.chat import Chat
    from model.report import report, stats

    return Chat(
        checkpoint, given, pictures, frames, budget={"retention": args.retention, "keep_tokens": args.keep_tokens},
        deliver=lambda generation: deliver(args, generation, meter),
        stats=lambda last: stats(report(last, args.model, args.seed, meter), meter.bandwidth(), last),
        debug=args.debug,
    ).run()  # fmt: skip


def versions():
    """One line each for this project, Python, torch and Triton."""
    import torch

    from model import __version__

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    return f"plphp {__version__}\npython {sys.version.split()[0]}\ntorch {torch.__version__}\ntriton {triton}"


if __name__ == "__main__":
    sys.exit(as_command(main))
