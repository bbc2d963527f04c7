//! What measuring without a guest shares: a cell is a run of this program as a child, perhaps under `strace`.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, bail};

use crate::stats::figure;

/// A path that does not exist: looking for it tells a trace where measuring begins and ends.
const MARK: &str = "/alveole-bench-mark";

/// Tells a trace that measuring begins, or ends.
pub(crate) fn mark() {
    let _ = fs::metadata(MARK);
}

/// What a cell printed.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let said = command.output().context("cannot start a cell")?;
    if !said.status.success() {
        let errors = String::from_utf8_lossy(&said.stderr);
        let last = errors.trim().lines().last().unwrap_or_default();
        bail!("{}: {last}", said.status);
    }
    Ok(String::from_utf8_lossy(&said.stdout).into_owned())
}

/// Calls between the two marks in the output of `strace -f`, of the threads that `counts` wants: it is asked with the
/// thread and with the one that marked.
pub(crate) fn count_calls(
    trace: &str,
    counts: impl Fn(&str, &str) -> bool,
) -> anyhow::Result<BTreeMap<String, u64>> {
    let is_mark = |line: &&str| line.contains(MARK);
    let marker = trace.lines().find(is_mark).context("strace saw no mark")?;
    let (marker, _) = marker.split_once(' ').context("no thread")?;
    let mut calls = BTreeMap::new();
    let lines = trace.lines().skip_while(|line| !is_mark(line)).skip(1);
    for line in lines.take_while(|line| !is_mark(line)) {
        let Some((thread, call)) = line.split_once(' ') else {
            continue;
        };
        let Some((name, _)) = call.trim_start().split_once('(') else {
            continue;
        };
        // Neither the second half of a call nor a signal.
        if counts(thread, marker) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            *calls.entry(name.to_owned()).or_default() += 1;
        }
    }
    Ok(calls)
}

/// The cells of a table: how many calls, and which.
pub(crate) fn calls_cells(calls: Option<&BTreeMap<String, f64>>) -> (String, String) {
    let Some(calls) = calls else {
        return ("–".to_owned(), String::new());
    };
    let each = calls.iter().filter(|(_, count)| **count >= 0.005);
    let each: Vec<_> = each.map(|(name, n)| format!("{name} {n:.2}")).collect();
    (figure(calls.values().sum()), each.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_but_the_marking_one() {
        let trace = format!(
            "10 write(3, \"\") = 8\n11 read(4, \"\", 8) = 8\n10 statx(AT_FDCWD, \"{MARK}\") = -1\n\
             11  read(4, \"\", 8) = 8\n10 write(3, \"\") = 8\n11 epoll_wait(5 <unfinished ...>\n\
             11 <... epoll_wait resumed>) = 1\n11 --- SIGCHLD (x) ---\n11 read(4, \"\", 8) = 8\n\
             10 statx(AT_FDCWD, \"{MARK}\") = -1\n11 close(3) = 0\n"
        );
        let others = |thread: &str, marker: &str| thread != marker;
        let want = [("epoll_wait".to_owned(), 1), ("read".to_owned(), 2)];
        assert_eq!(count_calls(&trace, others).unwrap(), BTreeMap::from(want));
        assert!(count_calls("10 write(3)", others).is_err());
    }

    #[test]
    fn one_thread() {
        let trace = format!(
            "10 writev(3) = 8\n9 statx(AT_FDCWD, \"{MARK}\") = -1\n10  readv(4) = 8\n11 writev(3) = 8\n\
             10 epoll_wait(5 <unfinished ...>\n10 <... epoll_wait resumed>) = 1\n10 --- SIGCHLD (x) ---\n\
             9 statx(AT_FDCWD, \"{MARK}\") = -1\n10 close(3) = 0\n"
        );
        let ten = |thread: &str, _: &str| thread == "10";
        let want = [("epoll_wait".to_owned(), 1), ("readv".to_owned(), 1)];
        assert_eq!(count_calls(&trace, ten).unwrap(), BTreeMap::from(want));
        assert!(count_calls("10 write(3)", ten).is_err());
    }
}
