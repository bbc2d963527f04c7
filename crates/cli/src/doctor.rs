//! `alveole doctor`: shows what `alveole_host::doctor` finds.

use std::env;
use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use alveole_host::doctor::{Check, Guests, Status, probe_kvm, run_checks};
use anyhow::Context;
use clap::ValueEnum;
use serde::Serialize;

#[derive(clap::Args)]
#[command(after_help = "\
Exit status: 0 if guests can run on this machine itself, 1 if something they need is missing.")]
pub(crate) struct DoctorArgs {
    /// For people or for programs
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,

    /// Only say whether this machine's KVM can run an unmodified kernel; exit status 0 if so, else 1
    #[arg(long, conflicts_with = "format")]
    probe_kvm: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Text,
    Json,
}

pub(crate) fn doctor(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    if args.probe_kvm {
        let probed = probe_kvm();
        crate::print(&format!("{}\n", probed.text))?;
        return Ok(exit(probed.capable));
    }
    let checks = run_checks();
    let guests = Guests::by(&checks);
    let text = match args.format {
        Format::Text => as_text(&checks, guests, colours_wanted()),
        Format::Json => as_json(&checks, guests)?,
    };
    crate::print(&text)?;
    Ok(exit(guests == Guests::Here))
}

fn exit(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What to do next, in one sentence.
fn summary(checks: &[Check], guests: Guests) -> String {
    match guests {
        Guests::Here => {
            "guests run here: alveole run IMAGE, or alveole run --kernel KERNEL --initrd INITRD".into()
        }
        Guests::Lab => {
            "guests run in the lab here: alveole run --lab --rm IMAGE, or alveole run --lab --kernel KERNEL --initrd INITRD"
                .into()
        }
        Guests::Nowhere => {
            let first = checks
                .iter()
                .find(|check| check.required && check.status == Status::Missing)
                .map_or("", |check| check.title);
            format!(
                "guests cannot run here, and there is no lab: mend what is missing, first {first}"
            )
        }
    }
}

fn colours_wanted() -> bool {
    let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal()
        && !set("NO_COLOR")
        && env::var_os("TERM").is_some_and(|term| term != "dumb")
}

fn as_text(checks: &[Check], guests: Guests, colours: bool) -> String {
    let widest = checks.iter().map(|check| check.title.chars().count()).max();
    let width = widest.unwrap_or_default();
    let mut text = String::new();
    for check in checks {
        let (on, off) = match check.status {
            _ if !colours => ("", ""),
            Status::Ok => ("\x1b[32m", "\x1b[0m"),
            Status::Missing if check.required => ("\x1b[1;31m", "\x1b[0m"),
            Status::Warn | Status::Missing => ("\x1b[33m", "\x1b[0m"),
        };
        let cure = match &check.cure {
            Some(cure) => format!("  -> {cure}"),
            None => String::new(),
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{on}{:7}{off}  {:width$}  {}{cure}",
            check.status, check.title, check.finding
        );
    }
    let _ = writeln!(text, "\n{}", summary(checks, guests));
    text
}

/// What programs read. Keys are only ever added.
#[derive(Serialize)]
struct Report<'a> {
    guests: Guests,
    summary: &'a str,
    checks: &'a [Check],
}

fn as_json(checks: &[Check], guests: Guests) -> anyhow::Result<String> {
    let summary = summary(checks, guests);
    let report = Report {
        guests,
        summary: &summary,
        checks,
    };
    let json =
        serde_json::to_string_pretty(&report).context("cannot write the findings as JSON")?;
    Ok(json + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(title: &'static str, status: Status, required: bool, cure: Option<&str>) -> Check {
        Check {
            key: "k",
            title,
            status,
            required,
            finding: "found".into(),
            cure: cure.map(str::to_owned),
        }
    }

    #[test]
    fn columns_are_aligned() {
        let checks = [
            check("long title", Status::Ok, true, None),
            check("x", Status::Missing, false, Some("mend it")),
        ];
        assert_eq!(
            as_text(&checks, Guests::Here, false),
            "ok       long title  found\n\
             missing  x           found  -> mend it\n\
             \n\
             guests run here: alveole run IMAGE, or alveole run --kernel KERNEL --initrd INITRD\n"
        );
    }

    #[test]
    fn colours_are_the_only_difference() {
        let checks = [
            check("a", Status::Ok, true, None),
            check("b", Status::Warn, false, Some("x")),
            check("c", Status::Missing, true, Some("x")),
        ];
        let coloured = as_text(&checks, Guests::Lab, true);
        let mut plain = coloured.clone();
        for code in ["\x1b[32m", "\x1b[33m", "\x1b[1;31m", "\x1b[0m"] {
            assert!(coloured.contains(code));
            plain = plain.replace(code, "");
        }
        assert_eq!(plain, as_text(&checks, Guests::Lab, false));
    }

    #[test]
    fn the_last_line_says_what_to_do() {
        let checks = [
            check("tun", Status::Missing, false, None),
            check("KVM device", Status::Missing, true, None),
        ];
        assert!(summary(&checks, Guests::Nowhere).ends_with("first KVM device"));
        assert!(summary(&checks, Guests::Lab).contains("run --lab"));
        assert!(!summary(&checks, Guests::Here).contains("--lab"));
    }
}
