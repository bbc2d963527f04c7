//! Counters to a file: one JSON object a line, one line a minute and one at the end. Firecracker's groups tell what has changed
//! since the line before; what has our own names are totals.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Instant, SystemTime};

use alveole_machine::Machine;
use alveole_metrics::FirecrackerLines;
use serde_json::{Map, Value, json};

/// Where counters go.
pub(crate) struct MetricsFile {
    file: File,
    /// When this process started.
    started: Instant,
    firecracker: FirecrackerLines,
}

impl MetricsFile {
    /// Opens the file.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn open(path: &Path, started: Instant) -> Result<Self, String> {
        Ok(Self {
            file: crate::logger::open(path)?,
            started,
            firecracker: FirecrackerLines::default(),
        })
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
        let mut text =
            serde_json::to_vec(&line).map_err(|e| format!("cannot write counters: {e}"))?;
        text.push(b'\n');
        let written = self.file.write_all(&text);
        written.map_err(|e| {
            format!("cannot write counters: {e}; is the disk full, or the reader of the pipe gone?")
        })
    }
}
