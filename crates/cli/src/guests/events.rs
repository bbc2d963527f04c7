//! `alveole events`: what happened to VMs, and what happens.

use std::io::{self, Write};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use alveole_instance::{Event, Happened, Vms};
use anyhow::Context;

use super::{Format, time_or_ago};

/// Who follows looks so often at the clock, and at whether there is anything to follow by now.
const LOOK: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
#[command(after_help = "\
Events: created, started, exec, stopping (somebody asked for its end), signalled, oom (the guest's kernel ended a process for want of \
memory), panicked, ended, restarting, lost (its keeper was killed, or the host went down: told by who finds it), renamed, updated, removed. \
Two files of 1 MiB keep them: the oldest go first.

Filters: event=WORD, vm=NAME or what its id begins with, image=NAME, label=NAME or label=NAME=VALUE. Of several with the same key one \
must fit, of those with different keys all.")]
pub(crate) struct EventsArgs {
    /// And what happens from now on
    #[arg(short, long)]
    follow: bool,
    /// Not what is older: a time (2026-01-02T03:04:05Z) or so long ago (10m)
    #[arg(long, value_name = "WHEN", value_parser = time_or_ago)]
    since: Option<SystemTime>,
    /// Not what is newer; with --follow, end then
    #[arg(long, value_name = "WHEN", value_parser = time_or_ago)]
    until: Option<SystemTime>,
    /// Only these; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// text, or json: an object on each line
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// What an event must have.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Filter {
    Event(String),
    Vm(String),
    Image(String),
    Label(String, Option<String>),
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "write event=WORD, vm=NAME, image=NAME, label=NAME or label=NAME=VALUE";
        let (key, value) = text.split_once('=').ok_or(expected)?;
        let value = value.to_owned();
        match key {
            "event" if Happened::WORDS.contains(&&*value) => Ok(Self::Event(value)),
            "event" => Err(format!(
                "{value:?} is no event: they are {}",
                Happened::WORDS.join(", ")
            )),
            "vm" => Ok(Self::Vm(value)),
            "image" => Ok(Self::Image(value)),
            "label" => Ok(match value.split_once('=') {
                Some((name, value)) => Self::Label(name.into(), Some(value.into())),
                None => Self::Label(value, None),
            }),
            _ => Err(format!("{key:?} is no key: {expected}")),
        }
    }
}

impl Filter {
    fn fits(&self, event: &Event) -> bool {
        match self {
            Self::Event(word) => event.what.word() == word,
            Self::Vm(name) => event.name == *name || !name.is_empty() && event.id.starts_with(name),
            Self::Image(image) => event.image == *image,
            Self::Label(name, value) => event
                .labels
                .get(name)
                .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
        }
    }
}

/// Of several with the same key one must fit, of those with different keys all.
fn fit(filters: &[Filter], event: &Event) -> bool {
    filters.iter().all(|filter| {
        let same_key =
            |other: &&Filter| std::mem::discriminant(*other) == std::mem::discriminant(filter);
        filters.iter().filter(same_key).any(|f| f.fits(event))
    })
}

pub(super) fn events(vms: &Vms, args: &EventsArgs) -> anyhow::Result<ExitCode> {
    let mut reader = vms.events()?;
    let mut out = io::stdout().lock();
    loop {
        // Before the last look: what happened until then is there then.
        let over = args.until.is_some_and(|until| SystemTime::now() > until);
        while let Some(event) = reader.next_event()? {
            let time = humantime::parse_rfc3339(&event.time).unwrap_or(SystemTime::UNIX_EPOCH);
            if args.since.is_some_and(|since| time < since)
                || args.until.is_some_and(|until| time > until)
                || !fit(&args.filter, &event)
            {
                continue;
            }
            let line = match args.format {
                Format::Json => serde_json::to_string(&event).context("cannot write JSON")?,
                Format::Text => as_text(&event),
            };
            match writeln!(out, "{line}").and_then(|()| out.flush()) {
                // Whoever reads has seen enough.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                written => written.context("cannot write events")?,
            }
        }
        if over || !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
        let left = args
            .until
            .and_then(|until| until.duration_since(SystemTime::now()).ok());
        let patience = left.map_or(LOOK, |left| left.min(LOOK));
        reader.wait(patience.max(Duration::from_millis(1)))?;
    }
}

fn as_text(event: &Event) -> String {
    let mut details = vec![format!("image={}", event.image)];
    match &event.what {
        Happened::Created | Happened::Panicked | Happened::Lost | Happened::Removed => {}
        Happened::Started { restarts: 0 } => {}
        Happened::Started { restarts } => details.push(format!("restarts={restarts}")),
        Happened::Exec { program } => details.push(format!("program={program}")),
        Happened::Stopping { signal: None } => details.push("machine".into()),
        Happened::Stopping {
            signal: Some(signal),
        }
        | Happened::Signalled { signal } => details.push(format!("signal={signal}")),
        Happened::Oom { process } => details.push(format!("process={process}")),
        Happened::Ended { status, why } => {
            details.push(format!("status={status}"));
            details.extend(why.iter().map(|why| format!("why={why}")));
        }
        Happened::Restarting { restarts, pause_ms } => {
            details.push(format!("restarts={restarts}"));
            details.push(format!("pause={pause_ms}ms"));
        }
        Happened::Renamed { from } => details.push(format!("from={from}")),
        Happened::Snapshot { stood_still_us } => {
            details.push(format!("stood_still_us={stood_still_us}"));
        }
        Happened::Restored { from } => details.push(format!("from={from}")),
        Happened::Updated { changed } => details.extend(changed.iter().cloned()),
    }
    let labels = event.labels.iter();
    details.extend(labels.map(|(name, value)| format!("{name}={value}")));
    // Some of it is a guest's word, or that of whoever made an image.
    let details: String = details
        .join(", ")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    format!(
        "{} {} {} {} ({details})",
        event.time,
        event.what.word(),
        event.name,
        event.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: Happened) -> Event {
        Event {
            time: "2026-01-02T03:04:05.000Z".into(),
            what,
            id: "0123456789ab".into(),
            name: "web".into(),
            image: "debian:12".into(),
            labels: [("tier".to_owned(), "front".to_owned())].into(),
        }
    }

    fn filters(words: &[&str]) -> Vec<Filter> {
        words.iter().map(|word| word.parse().unwrap()).collect()
    }

    #[test]
    fn one_of_the_same_key_and_all_keys_must_fit() {
        let ended = event(Happened::Ended {
            status: 1,
            why: None,
        });
        for words in [
            &[][..],
            &["event=ended"],
            &["event=created", "event=ended"],
            &["vm=web", "image=debian:12", "label=tier"],
            &["vm=0123", "label=tier=front"],
        ] {
            assert!(fit(&filters(words), &ended), "{words:?}");
        }
        for words in [
            &["event=created"][..],
            &["vm=we"],
            &["vm="],
            &["vm=web", "image=debian"],
            &["label=tier=back"],
            &["label=other", "event=ended"],
        ] {
            assert!(!fit(&filters(words), &ended), "{words:?}");
        }
        for (word, why) in [
            ("x", "write event=WORD"),
            ("x=y", "is no key"),
            ("event=died", "is no event: they are created, started"),
        ] {
            let refused = word.parse::<Filter>().unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn a_guest_does_not_write_to_the_terminal() {
        let oom = event(Happened::Oom {
            process: "12 (\x1b[2J\n)".into(),
        });
        assert_eq!(
            as_text(&oom),
            "2026-01-02T03:04:05.000Z oom web 0123456789ab (image=debian:12, process=12 ( [2J ), tier=front)"
        );
    }
}
