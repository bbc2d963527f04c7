//! What is made of the command line's own description: completions for shells, and man pages.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Command, Subcommand};

#[derive(clap::Args)]
pub(crate) struct GenerateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Completions of a shell, on the standard output
    #[command(
        after_help = "For bash: alveole generate completions bash >~/.local/share/bash-completion/completions/alveole"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Man pages, one for each command, into a folder
    Man {
        /// The folder, which is there
        folder: PathBuf,
    },
}

pub(crate) fn generate(args: &GenerateArgs, mut command: Command) -> anyhow::Result<ExitCode> {
    match &args.what {
        What::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut command, "alveole", &mut text);
            match io::Write::write_all(&mut io::stdout(), &text) {
                Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(e).context("cannot write to standard output");
                }
                _ => {}
            }
        }
        What::Man { folder } => {
            clap_mangen::generate_to(command, folder)
                .with_context(|| format!("cannot write man pages into '{}'", folder.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
