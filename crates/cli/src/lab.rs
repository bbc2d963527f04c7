//! `alveole run --lab`: this program once more, in the lab.

use std::convert::Infallible;
use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use alveole_host::programs;
use anyhow::{Context, bail};
use rustix::fs::FileType;

use crate::console::Console;
use crate::disk::Disk;
use crate::run::RunArgs;

/// What the lab needs for itself: its kernel, page cache and the files that change in it.
const LAB_MEMORY_MIB: u64 = 1 << 10;
/// With one processor the guest and its devices would wait for each other.
const LEAST_CPUS: usize = 2;

/// What standard input and output are.
#[derive(Debug, Clone, Copy)]
struct Streams {
    /// Both are a terminal.
    terminal: bool,
    /// Input is a file or a pipe, which ends.
    input_ends: bool,
}

impl Streams {
    fn of_this_process() -> Self {
        let stdin = io::stdin();
        let kind = rustix::fs::fstat(&stdin).map(|stat| FileType::from_raw_mode(stat.st_mode));
        Self {
            terminal: stdin.is_terminal() && io::stdout().is_terminal(),
            input_ends: matches!(kind, Ok(FileType::RegularFile | FileType::Fifo)),
        }
    }
}

/// Becomes the lab tool, which runs this program with the same arguments in the lab.
pub(crate) fn enter(args: &RunArgs) -> anyhow::Result<Infallible> {
    let tool = programs::lab_tool()?;
    let exe = env::current_exe().context("cannot find out which program this is")?;
    let host_cpus = thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new(&tool);
    command
        .args(options(args, Streams::of_this_process(), host_cpus)?)
        .arg("--")
        .arg(exe)
        .args(inner(env::args_os().skip(1)));
    Err(command.exec()).with_context(|| format!("cannot start the lab, {}", tool.display()))
}

/// What the lab tool is told.
fn options(args: &RunArgs, streams: Streams, host_cpus: usize) -> anyhow::Result<Vec<OsString>> {
    let interactive = args.console == Console::Stdio && streams.terminal;
    let cpus = (usize::from(args.cpus) + 1).clamp(LEAST_CPUS, host_cpus.max(LEAST_CPUS));
    let memory = args.memory.mib().saturating_add(LAB_MEMORY_MIB);
    let mut words: Vec<OsString> = vec![
        if interactive { "shell" } else { "run" }.into(),
        "--cpus".into(),
        cpus.to_string().into(),
        "--memory".into(),
        memory.to_string().into(),
    ];
    match &args.console {
        Console::Stdio if !interactive && streams.input_ends => words.push("--stdin".into()),
        Console::Stdio | Console::None => {}
        Console::File(path) => words.extend(["--bring-back".into(), path.into()]),
        Console::Unix(path) => bail!(
            "cannot reach the console unix:{} from outside of the lab; use --console stdio or file:PATH \
             with --lab",
            path.display()
        ),
    }
    if args.vsock.is_some() {
        bail!(
            "cannot reach the socket of --vsock from outside of the lab; leave it out, or run a program in the lab \
             beside the guest (tools/lab run -- ...)"
        );
    }
    if let Some(why) = args.network.refused_in_lab() {
        bail!(
            "{why}; leave it out with --lab, or name a network, which is then made in the lab (sudo alveole net create)"
        );
    }
    for image in args.disk.iter().filter_map(Disk::written) {
        if interactive {
            bail!(
                "what a guest in the lab writes to {} cannot be kept on a terminal; add ,ro to it, or use \
                 --console file:PATH or a pipe",
                image.display()
            );
        }
        words.extend(["--bring-back".into(), image.into()]);
    }
    Ok(words)
}

/// The same command line for the lab. There the probe is spared: the lab was asked for by name, and one
/// that is slow under load must not be taken for a KVM without hardware.
fn inner(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<_> = words
        .filter(|word| word != "--lab" && word != "--no-probe")
        .collect();
    words.push("--no-probe".into());
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::parse;

    const PIPED: Streams = Streams {
        terminal: false,
        input_ends: true,
    };
    const TERMINAL: Streams = Streams {
        terminal: true,
        input_ends: false,
    };
    const NOTHING: Streams = Streams {
        terminal: false,
        input_ends: false,
    };

    fn line(words: &[&str], streams: Streams, host_cpus: usize) -> String {
        options(&parse(words), streams, host_cpus)
            .unwrap()
            .join(" ".as_ref())
            .into_string()
            .unwrap()
    }

    #[test]
    fn the_lab_is_larger_than_the_guest() {
        assert_eq!(
            line(&["--memory", "5G"], NOTHING, 16),
            "run --cpus 2 --memory 6144"
        );
        assert_eq!(
            line(&["--cpus", "8"], NOTHING, 16),
            "run --cpus 9 --memory 1280"
        );
        assert_eq!(
            line(&["--cpus", "8"], NOTHING, 4),
            "run --cpus 4 --memory 1280"
        );
        assert_eq!(
            line(&["--cpus", "8"], NOTHING, 1),
            "run --cpus 2 --memory 1280"
        );
    }

    #[test]
    fn a_terminal_stays_one() {
        assert!(line(&[], TERMINAL, 2).starts_with("shell "));
        assert!(line(&["--console", "none"], TERMINAL, 2).starts_with("run "));
        assert!(line(&[], PIPED, 2).ends_with(" --stdin"));
        assert!(!line(&["--console", "none"], PIPED, 2).contains("--stdin"));
    }

    #[test]
    fn a_console_file_comes_back_and_a_socket_cannot() {
        assert!(line(&["--console", "file:a b"], NOTHING, 2).ends_with("--bring-back a b"));
        let refused = options(&parse(&["--console", "unix:s"]), NOTHING, 2).unwrap_err();
        assert!(refused.to_string().contains("unix:s"));
    }

    #[test]
    fn a_vsock_path_cannot_be_reached_from_outside() {
        let refused = options(&parse(&["--vsock", "3:v.sock"]), NOTHING, 2).unwrap_err();
        assert!(refused.to_string().contains("--vsock"), "{refused}");
    }

    #[test]
    fn a_disk_comes_back_as_it_was_written() {
        let words = ["--disk", "a.img", "--disk", "b.img,ro", "--disk", "c"];
        let told = line(&words, NOTHING, 2);
        assert!(
            told.ends_with("--bring-back a.img --bring-back c"),
            "{told}"
        );
        let refused = options(&parse(&words), TERMINAL, 2).unwrap_err();
        assert!(refused.to_string().contains("a.img"), "{refused}");
        assert!(line(&["--disk", "b.img,ro"], TERMINAL, 2).starts_with("shell"));
    }

    #[test]
    fn the_lab_is_entered_once() {
        let words = ["run", "--no-probe", "--kernel", "k", "--lab"].map(OsString::from);
        assert_eq!(
            inner(words.into_iter()),
            ["run", "--kernel", "k", "--no-probe"]
        );
    }
}
