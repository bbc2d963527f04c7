//! Copies of a VM as people make them: snapshot, restore until something is executed there, fork.

use std::ffi::OsString;
use std::time::Instant;

use super::{Bench, OURS, milliseconds};

/// Rows of the table.
pub(super) const SNAPSHOT: &str = "`snapshot create VM`";
pub(super) const RESTORE: &str = "`restore SNAPSHOT`";
pub(super) const RESTORED_EXEC: &str =
    "`restore SNAPSHOT`, then `exec COPY true`: until that is answered";
pub(super) const FORK: &str = "`fork -n 20 VM` (2 in a smoke run), each of them";

/// A file with the words of processors for guests that are to be copied, which the kernel of `ALVEOLE_NATIVE_KERNEL` may need.
const CPU_CONFIG: &str = "ALVEOLE_NATIVE_CPU_CONFIG";
/// How many at once, and in a smoke run.
const FORKS: (u32, u32) = (20, 2);
/// Names of what is made here.
const SOURCE: &str = "source";
const MOMENT: &str = "moment";
const COPY: &str = "copy";

impl Bench {
    /// Copies a VM so often in each way, once and little in a smoke run.
    pub(super) fn copies(&mut self, rounds: Option<u32>) -> anyhow::Result<()> {
        let forks = rounds.map_or(FORKS.1, |_| FORKS.0);
        let config = std::env::var_os(CPU_CONFIG).map(OsString::into_string);
        let config = config.and_then(Result::ok);
        let mut middle = vec!["-d", "--name", SOURCE];
        if let Some(config) = &config {
            middle.extend(["--cpu-config", config]);
        }
        self.does(&self.run_words(&middle, &["/bin/sleep", "100000"]))?;
        let measured = (0..rounds.unwrap_or(1)).try_for_each(|_| self.copy_once(forks));
        self.does(&["rm", "-f", SOURCE])?;
        measured
    }

    fn copy_once(&mut self, forks: u32) -> anyhow::Result<()> {
        let add = |bench: &mut Self, row, start: Instant| {
            bench.table.add(row, OURS, milliseconds(start.elapsed()));
        };
        let start = Instant::now();
        self.does(&["snapshot", "create", SOURCE, MOMENT])?;
        add(self, SNAPSHOT, start);
        let start = Instant::now();
        self.does(&["restore", MOMENT, "--name", COPY])?;
        add(self, RESTORE, start);
        self.does(&["exec", COPY, "/bin/true"])?;
        add(self, RESTORED_EXEC, start);
        self.does(&["rm", "-f", COPY])?;
        self.does(&["snapshot", "rm", MOMENT])?;
        let start = Instant::now();
        let made = self.does(&["fork", SOURCE, "-n", &forks.to_string(), "--name", COPY])?;
        let each = milliseconds(start.elapsed()) / f64::from(forks);
        self.table.add(FORK, OURS, each);
        let names: Vec<_> = made.lines().collect();
        self.does(&[&["rm", "-f"][..], &names].concat()).map(drop)
    }
}
