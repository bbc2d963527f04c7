//! Counters to a file: one JSON object a line, one line a minute and one at the end. Firecracker's groups tell what has changed
//! since the line before; what has our own names are totals.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use alveole_machine::Machine;
use alveole_metrics::FirecrackerLines;
use nix::time::ClockId;
use serde_json::{Map, Value, json};

use crate::cli::Launched;

/// Where counters go.
pub(crate) struct MetricsFile {
    file: File,
    /// When this process started.
    started: Instant,
    firecracker: FirecrackerLines,
    startup: Startup,
}

/// How long the start took, in microseconds: from the jailer's first instruction until the API was served. 0: nobody said when that was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Startup {
    wall_us: u64,
    cpu_us: u64,
}

impl Startup {
    /// Of a start that is over now. As Firecracker has it, what another process used counts, if one says so.
    pub(crate) fn until_now(launched: Launched) -> Self {
        let us = |clock| {
            let now = nix::time::clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
            u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
        };
        Self::until(
            launched,
            us(ClockId::CLOCK_MONOTONIC),
            us(ClockId::CLOCK_PROCESS_CPUTIME_ID),
        )
    }

    fn until(launched: Launched, now_us: u64, used_us: u64) -> Self {
        let since = |now: u64, start: u64| now.saturating_sub(start);
        let own = launched.start_cpu_us.map(|start| since(used_us, start));
        Self {
            wall_us: launched.start_us.map_or(0, |start| since(now_us, start)),
            cpu_us: own.map_or(0, |own| {
                own.saturating_add(launched.parent_cpu_us.unwrap_or(0))
            }),
        }
    }
}

impl MetricsFile {
    /// Opens the file.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn open(path: &Path, started: Instant, startup: Startup) -> Result<Self, String> {
        Ok(Self {
            file: crate::logger::open(path)?,
            started,
            firecracker: FirecrackerLines::default(),
            startup,
        })
    }

    /// Tells the times of the start from now on.
    pub(crate) fn set_startup(&mut self, startup: Startup) {
        self.startup = startup;
    }

    /// Writes one line with all counters of `machine`.
    ///
    /// # Errors
    /// The host takes no more; the line is lost.
    pub(crate) fn write(&mut self, machine: &Machine) -> Result<(), String> {
        let mut line = Map::new();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        line.insert("utc_timestamp_ms".into(), json!(now.as_millis() as u64));
        let since_start = |at: Option<Instant>| {
            at.map(|at| at.saturating_duration_since(self.started).as_micros() as u64)
        };
        let milestones = machine.milestones();
        line.insert(
            "boot".into(),
            json!({
                "first_instruction_us": since_start(milestones.first_instruction),
                "init_us": since_start(milestones.booted),
            }),
        );
        let mut all = machine.counters().gather();
        let (lost, left_out) = crate::logger::counts();
        let logger = vec![("lost".into(), lost), ("left_out".into(), left_out)];
        all.push(("logger".to_owned(), logger));
        let groups = self.firecracker.next(&all);
        // Of the logger only what Firecracker has of it.
        all.pop();
        for (set, counters) in all {
            let counters = counters.into_iter().map(|(name, n)| (name, Value::from(n)));
            line.insert(set, Value::Object(counters.collect()));
        }
        for (group, fields) in groups {
            match (line.get_mut(&group), fields) {
                (Some(Value::Object(ours)), Value::Object(fields)) => ours.extend(fields),
                (_, fields) => drop(line.insert(group, fields)),
            }
        }
        let api_server = line.entry("api_server").or_insert_with(|| json!({}));
        api_server["process_startup_time_us"] = json!(self.startup.wall_us);
        api_server["process_startup_time_cpu_us"] = json!(self.startup.cpu_us);
        let mut text =
            serde_json::to_vec(&line).map_err(|e| format!("cannot write counters: {e}"))?;
        text.push(b'\n');
        let written = self.file.write_all(&text);
        written.map_err(|e| {
            format!("cannot write counters: {e}; is the disk full, or the reader of the pipe gone?")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_as_long_as_who_launched_it_says() {
        let mut launched = Launched::default();
        assert_eq!(Startup::until(launched, 9, 9), Startup::default());
        launched.start_us = Some(1000);
        launched.start_cpu_us = Some(30);
        let startup = Startup::until(launched, 5000, 100);
        assert_eq!((startup.wall_us, startup.cpu_us), (4000, 70));
        launched.parent_cpu_us = Some(7);
        assert_eq!(Startup::until(launched, 5000, 100).cpu_us, 77);
        // Clocks that lie.
        assert_eq!(Startup::until(launched, 0, 0).wall_us, 0);
    }
}
