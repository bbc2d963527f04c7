//! The life of a machine, and which changes it can go through when: a pure table.
//!
//! ```text
//! Built ──Start──▶ Running ⇄ Paused        any but Stopped ──Stop──▶ Stopped
//! ```

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// Everything is in place, no guest instruction has run.
    Built,
    /// The processors run.
    Running,
    /// The processors are paused.
    Paused,
    /// Over.
    Stopped,
}

/// What changes a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Run the guest for the first time.
    Start,
    /// Pause all processors.
    Pause,
    /// Let paused processors go on.
    Resume,
    /// Ask the guest to power off.
    PressPowerButton,
    /// End the machine.
    Stop,
}

/// Whether `change` is possible in `state`: the next state, or why not, in words for whoever asked.
///
/// # Errors
/// The change makes no sense in this state.
pub fn next(state: Lifecycle, change: Change) -> Result<Lifecycle, &'static str> {
    use Change::{Pause, PressPowerButton, Resume, Start, Stop};
    use Lifecycle::{Built, Paused, Running, Stopped};
    match (state, change) {
        (Stopped, Stop) | (Built | Running | Paused, Stop) => Ok(Stopped),
        (Stopped, _) => Err("the machine has ended"),
        (Built, Start) => Ok(Running),
        (Running | Paused, Start) => Err("the machine has been started already"),
        (Built, Pause | Resume | PressPowerButton) => Err("the machine has not been started yet"),
        (Running, Pause) => Ok(Paused),
        (Paused, Pause) => Err("the machine is paused already"),
        (Paused, Resume) => Ok(Running),
        (Running, Resume) => Err("the machine is running already"),
        (Running, PressPowerButton) => Ok(Running),
        // The interrupt waits until the processors run again.
        (Paused, PressPowerButton) => Ok(Paused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Change::{Pause, PressPowerButton, Resume, Start, Stop};
    use Lifecycle::{Built, Paused, Running, Stopped};

    #[test]
    fn the_whole_table() {
        let table = [
            (Built, [Some(Running), None, None, None, Some(Stopped)]),
            (
                Running,
                [None, Some(Paused), None, Some(Running), Some(Stopped)],
            ),
            (
                Paused,
                [None, None, Some(Running), Some(Paused), Some(Stopped)],
            ),
            (Stopped, [None, None, None, None, Some(Stopped)]),
        ];
        for (state, row) in table {
            for (change, want) in [Start, Pause, Resume, PressPowerButton, Stop]
                .into_iter()
                .zip(row)
            {
                let got = next(state, change);
                assert_eq!(got.ok(), want, "{state:?} + {change:?}");
                if let Err(why) = got {
                    assert!(why.starts_with("the machine"), "{why}");
                }
            }
        }
    }
}
