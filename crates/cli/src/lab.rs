//! `alveole run --lab`: this program once more, in the lab.
//!
//! The lab sees this machine's files, kernels and images among them; what is written there is forgotten with it, but for what is
//! brought back. So a guest of an image goes with the lab, too, and whoever asks for something that would stay is refused.

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
use crate::places::{DATA_VARIABLE, Places};
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
        // Who is somebody else here is root there, whose kernels and images are elsewhere.
        .env(DATA_VARIABLE, Places::usual().data)
        .args(options(args, Streams::of_this_process(), host_cpus)?)
        .arg("--")
        .args(environment(args)?)
        .arg(exe)
        .args(inner(env::args_os().skip(1), args.no_probe));
    Err(command.exec()).with_context(|| format!("cannot start the lab, {}", tool.display()))
}

/// What the lab tool is told.
fn options(args: &RunArgs, streams: Streams, host_cpus: usize) -> anyhow::Result<Vec<OsString>> {
    if let Some(why) = args.network.refused_in_lab() {
        bail!(
            "{why}; leave it out with --lab, or name a network, which is then made in the lab (sudo alveole net create)"
        );
    }
    if args.image.is_some()
        && let Some(why) = args.for_image.refused_in_lab()
    {
        bail!("{why}");
    }
    let (wants_terminal, wants_input) = match args.image {
        Some(_) => (args.for_image.wants_terminal(), args.for_image.interactive),
        None => (
            args.console == Console::Stdio,
            args.console == Console::Stdio,
        ),
    };
    let interactive = wants_terminal && streams.terminal;
    let cpus = (usize::from(args.cpus) + 1).clamp(LEAST_CPUS, host_cpus.max(LEAST_CPUS));
    let memory = args.memory.mib().saturating_add(LAB_MEMORY_MIB);
    let mut words: Vec<OsString> = vec![
        if interactive { "shell" } else { "run" }.into(),
        "--cpus".into(),
        cpus.to_string().into(),
        "--memory".into(),
        memory.to_string().into(),
    ];
    if wants_input && !interactive && streams.input_ends {
        words.push("--stdin".into());
    }
    if args.image.is_some() {
        // Nothing of it is brought back, and --disk is the size of one that is made in the lab.
        return Ok(words);
    }
    match &args.console {
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

/// What sets the variables that the guest's process is to have from this one, of which the lab knows a few only.
fn environment(args: &RunArgs) -> anyhow::Result<Vec<String>> {
    let mut words = vec!["env".to_owned()];
    for name in args.for_image.inherited()? {
        if let Ok(value) = env::var(&name) {
            words.push(format!("{name}={value}"));
        }
    }
    if words.len() == 1 {
        words.clear();
    }
    Ok(words)
}

/// The same command line for the lab, where `--lab` says nothing. There the probe is spared: the lab was asked for by
/// name, and one that is slow under load must not be taken for a KVM without hardware.
fn inner(words: impl Iterator<Item = OsString>, no_probe: bool) -> Vec<OsString> {
    let mut words: Vec<_> = words.collect();
    if !no_probe {
        // Behind `run`: what follows an image is its program's.
        words.insert(1.min(words.len()), "--no-probe".into());
    }
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
    fn an_image_has_the_terminal_that_it_asks_for() {
        let image = |words: &[&str], streams| line(&[words, &["image", "sh"]].concat(), streams, 2);
        assert!(image(&["--rm", "-it"], TERMINAL).starts_with("shell "));
        assert!(image(&["--rm"], TERMINAL).starts_with("run "));
        assert!(image(&["--rm", "-i"], PIPED).ends_with(" --stdin"));
        assert!(!image(&["--rm"], PIPED).contains("--stdin"));
        assert_eq!(
            image(&["--rm", "--disk", "1G"], NOTHING),
            "run --cpus 2 --memory 1280"
        );
    }

    #[test]
    fn what_would_stay_is_refused() {
        for (words, said) in [
            (&["image"][..], "--rm"),
            (&["--rm", "-d", "image"], "-d"),
            (&["--rm", "-P", "image"], "-P"),
            (&["--rm", "-v", "data:/data", "image"], "data"),
            (&["--rm", "-p", "1:1", "image"], "-p"),
        ] {
            let refused = options(&parse(words), TERMINAL, 2).unwrap_err();
            assert!(refused.to_string().contains(said), "{words:?}: {refused}");
        }
        assert!(line(&["--rm", "-v", "./here:/data", "image"], NOTHING, 2).starts_with("run"));
    }

    #[test]
    fn a_variable_without_a_value_is_taken_along() {
        let args = |name| environment(&parse(&["--rm", "-e", name, "-e", "A=b", "image"])).unwrap();
        let path = format!("PATH={}", env::var("PATH").unwrap());
        assert_eq!(args("PATH"), ["env".to_owned(), path]);
        assert!(args("NO_SUCH_VARIABLE").is_empty());
    }

    #[test]
    fn the_lab_is_entered_once() {
        let words = ["run", "--lab", "image", "program", "--no-probe"].map(OsString::from);
        assert_eq!(
            inner(words.clone().into_iter(), false),
            [
                "run",
                "--no-probe",
                "--lab",
                "image",
                "program",
                "--no-probe"
            ]
        );
        assert_eq!(inner(words.clone().into_iter(), true), words);
    }
}
