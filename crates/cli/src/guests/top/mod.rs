//! `alveole top`: what VMs use, live on a terminal; once, as text or JSON, elsewhere.

mod gather;
mod rows;
mod screen;
mod view;

use std::io;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use alveole_instance::{State, Vm, Vms};
use anyhow::Context;
use serde_json::Value;

use super::sample::{samples, used_between};
use super::{Format, table};
use crate::print;
use gather::Gatherer;
use rows::{COLUMNS, Row, Rows, Sort};
use screen::{Input, Screen};
use view::{Told, View};

#[derive(clap::Args)]
#[command(after_help = "\
Keys: arrows, Page Up, Page Down, Home and End move; n, c, v, m, g, d, t, x, or < and > sort by name, cpu, vmm, memory, guest-memory, \
disk, net, exits; r turns the order round; / filters by name, id, image or label as it is typed (Enter keeps it, Esc drops it); \
Ctrl-Z puts it aside; q or Ctrl-C ends.

GUEST% is processor time of the vCPUs in the guest, VMM% of all else of the monitor, both in percent of one processor. PSS is the \
monitor's memory, shared pages in parts; GUEST MEM used and all memory as the guest sees it. EXITS/s are returns of vCPUs to the monitor. \
\"no answer\": the guest's agent is silent.")]
pub(crate) struct TopArgs {
    /// Between two looks, in seconds
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    delay: Duration,
    /// By what VMs are sorted
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Only VMs with this in their name, image or a label (NAME=VALUE), or with an id that begins so
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// One view as plain text, as where standard output is no terminal
    #[arg(long, visible_alias = "batch")]
    once: bool,
    /// text, or json: one view as objects
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    seconds
        .filter(|s| (0.1..=3600.0).contains(s))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "write seconds, from 0.1 to 3600".into())
}

pub(super) fn top(vms: &Vms, args: &TopArgs) -> anyhow::Result<ExitCode> {
    let rows = Rows::new(args.sort, &args.filter);
    if args.format == Format::Json {
        let objects: Vec<Value> = once(vms, args.delay, rows)?
            .shown()
            .into_iter()
            .map(Row::as_json)
            .collect();
        let json = serde_json::to_string_pretty(&objects).context("cannot write JSON")?;
        print(&format!("{json}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.once || !rustix::termios::isatty(io::stdout()) {
        let rows = once(vms, args.delay, rows)?;
        let titles: Vec<_> = COLUMNS.iter().map(|column| column.title).collect();
        let cells = |row: &Row| COLUMNS.iter().map(|column| (column.cell)(row)).collect();
        let lines = rows.shown().into_iter().map(cells).collect();
        print(&format!("{}\n{}", rows.head(), table(&titles, lines)))?;
        return Ok(ExitCode::SUCCESS);
    }
    live(vms, args.delay, rows)
}

fn once(vms: &Vms, delay: Duration, mut rows: Rows) -> anyhow::Result<Rows> {
    let before = samples(vms, &[])?;
    if !before.is_empty() {
        thread::sleep(delay);
    }
    let now = samples(vms, &[])?;
    let row = |(vm, usage): (Vm, _)| {
        let phase = match vm.state() {
            Ok(State::Kept(phase)) => phase.phase,
            _ => return None,
        };
        let answers = now
            .iter()
            .any(|(other, sample)| other.record.id == vm.record.id && sample.guest.is_some());
        Some(Row::new(&vm, phase, answers, usage))
    };
    let all = used_between(&before, &now);
    rows.set(all.into_iter().filter_map(row).collect());
    Ok(rows)
}

fn live(vms: &Vms, delay: Duration, rows: Rows) -> anyhow::Result<ExitCode> {
    // What cannot be read at all is told before the terminal is taken.
    vms.list()?;
    let gatherer = Gatherer::start(vms.clone(), delay).context("cannot start to look at VMs")?;
    let (sender, inputs) = channel();
    let mut screen = Screen::enter(sender).context(
        "cannot use this terminal for a live view (--once prints one view as plain text)",
    )?;
    let mut view = View::new(rows);
    // The first figures come with the second look.
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next {
            view.rows.set(gatherer.rows());
            view.trouble = gatherer.trouble();
            next = Instant::now()
                + if gatherer.has_rates() {
                    delay
                } else {
                    delay.min(SOON)
                };
        }
        screen.draw(&mut view)?;
        let wait = next.saturating_duration_since(Instant::now());
        let input = match inputs.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => Input::Gone("nobody reads it".into()),
            Ok(input) => input,
        };
        match input {
            Input::Key(key) => match view.key(key) {
                Told::Nothing => {}
                Told::Suspend => screen.suspend()?,
                Told::End => return Ok(ExitCode::SUCCESS),
            },
            // The next drawing looks at the size.
            Input::Resized => {}
            Input::Suspend => screen.suspend()?,
            Input::Signal(signal) => screen.die_of(signal),
            Input::Gone(why) => {
                drop(screen);
                anyhow::bail!("cannot read the terminal: {why}");
            }
        }
    }
}

/// Until there are figures, the view looks for them so often.
const SOON: Duration = Duration::from_millis(200);
