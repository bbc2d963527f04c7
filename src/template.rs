//! `--template`: a process that has a snapshot read and its memory mapped, and of which each guest of that snapshot is a copy.

use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use alveole_machine::{End, Prepared};
use alveole_process_template::{Numbers, Template};

use crate::cli::{self, Args, Request};
use crate::description;
use crate::exit::Failure;
use crate::logger;

/// Runs a guest in this process, or serves as a template and runs one in each copy. None: it was one, and is wanted no more.
pub(crate) fn begin(args: &Args, started: Instant) -> Result<Option<End>, Failure> {
    alveole_thread_sandbox::share_heap();
    logger::start(args.id());
    crate::raise_descriptor_limit();
    let Some(socket) = &args.template else {
        return crate::run(args, started, None).map(Some);
    };
    let Some((args, prepared)) = serve(args, socket)? else {
        return Ok(None);
    };
    logger::start(args.id());
    crate::run(&args, crate::process_start(), Some(prepared)).map(Some)
}

/// Prepares what `args` say, and makes copies of this process for who asks at `socket`. Returns in each copy, with its own command line and what
/// was prepared; without, in the template, when no more copies are wanted.
///
/// # Errors
/// The snapshot cannot be loaded, or nobody could ask. In a copy: its command line is wrong.
fn serve(args: &Args, socket: &Path) -> Result<Option<(Box<Args>, Prepared)>, Failure> {
    let host = |e: &dyn std::error::Error| Failure::Host(format!("--template: {e}"));
    // Before anything else is open.
    let numbers = Numbers::reserve().map_err(|e| host(&e))?;
    logger::change(&args.logger()).map_err(Failure::Host)?;
    let load = args.load_snapshot.as_deref().map(description::read_load);
    let load = load.transpose()?.unwrap_or_default();
    let mut prepared = Prepared::open(&load).map_err(|e| Failure::Config(e.to_string()))?;
    prepared
        .map_memory()
        .map_err(|e| match e.blames_description() {
            true => Failure::Config(e.to_string()),
            false => host(&e),
        })?;
    let template = Template::listen(socket, numbers).map_err(|e| host(&e))?;
    match template.serve().map_err(|e| host(&e))? {
        None => Ok(None),
        Some(words) => Ok(Some((copy_args(words)?, prepared))),
    }
}

/// The command line of a copy.
fn copy_args(words: Vec<OsString>) -> Result<Box<Args>, Failure> {
    match cli::parse(words).map_err(Failure::Usage)? {
        Request::Run(args) if args.load_snapshot.is_some() && args.template.is_none() => Ok(args),
        _ => Err(Failure::Usage(
            "a copy of a template loads the snapshot that was prepared, and does nothing else: --load-snapshot FILE says what is its own".into(),
        )),
    }
}
