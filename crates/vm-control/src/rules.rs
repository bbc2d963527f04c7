//! What may be asked when: a pure table.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::{Command, Refusal};

/// Where a machine is in its life, as whoever controls it sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is being described.
    NotStarted,
    /// Its processors run.
    Running,
    /// Its processors stand still.
    Paused,
    /// Over.
    Ended,
}

impl fmt::Display for State {
    /// The words of the API.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotStarted => "Not started",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Ended => "Ended",
        })
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// When a command makes sense.
enum When {
    BeforeStart,
    AfterStart,
    WhilePaused,
    Always,
}

fn when(command: &Command) -> When {
    match command {
        Command::GetInstance
        | Command::GetVersion
        | Command::GetConfig
        | Command::GetMachineConfig
        | Command::GetMetadata
        | Command::GetMetrics { .. }
        | Command::PutMetadata(_)
        | Command::PatchMetadata(_) => When::Always,
        Command::PutBootSource(_)
        | Command::PutMachineConfig(_)
        | Command::PatchMachineConfig(_)
        | Command::PutCpuConfig(_)
        | Command::PutDrive(_)
        | Command::PutNetworkInterface(_)
        | Command::PutVsock(_)
        | Command::PutEntropy(_)
        | Command::PutSerial(_)
        | Command::PutLogger(_)
        | Command::PutMetrics(_)
        | Command::PutMetadataConfig(_)
        | Command::LoadSnapshot(_)
        | Command::Start => When::BeforeStart,
        Command::CreateSnapshot(create) if !create.live => When::WhilePaused,
        // Who pauses a paused machine has what was wanted; so has who resumes a running one.
        Command::Pause
        | Command::Resume
        | Command::SendCtrlAltDel
        | Command::FlushMetrics
        | Command::PatchDrive(_)
        | Command::SetLink { .. }
        | Command::CreateSnapshot(_)
        | Command::PatchNetworkInterface(_) => When::AfterStart,
    }
}

/// Whether `command` may be carried out in `state`.
///
/// # Errors
/// It may not; the text says why and what to do.
pub fn permit(state: State, command: &Command) -> Result<(), Refusal> {
    let why = match (state, when(command)) {
        (State::Ended, _) => "the machine has ended; start this program anew",
        (State::NotStarted, When::AfterStart | When::WhilePaused) => {
            "the guest has not been started yet; PUT /actions {\"action_type\": \"InstanceStart\"} starts it"
        }
        (State::Running | State::Paused, When::BeforeStart) => {
            "the guest has been started already, and this can only be done before; start another machine for it"
        }
        (State::Running, When::WhilePaused) => {
            "the guest runs; PATCH /vm {\"state\": \"Paused\"} pauses it, or ask for it with \"live\": true"
        }
        (State::NotStarted, When::BeforeStart | When::Always)
        | (State::Running, When::AfterStart | When::Always)
        | (State::Paused, When::AfterStart | When::WhilePaused | When::Always) => return Ok(()),
    };
    Err(Refusal::State {
        act: command.to_string(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Command as C;
    use State::{Ended, NotStarted, Paused, Running};
    use alveole_vm_config::{
        DriveUpdate, MachineConfigUpdate, Metrics, MmdsConfig, NetworkInterfaceUpdate,
        SnapshotCreate,
    };
    use serde_json::Value;

    /// Each command, and whether it may be carried out before the start, while running and while paused.
    fn table() -> Vec<(Command, [bool; 3])> {
        let (before, after, always) = ([true, false, false], [false, true, true], [true; 3]);
        let paused = [false, false, true];
        let live = SnapshotCreate {
            live: true,
            ..SnapshotCreate::default()
        };
        let mmds = MmdsConfig {
            version: Default::default(),
            network_interfaces: Vec::new(),
            ipv4_address: None,
            imds_compat: false,
        };
        let metrics = Metrics {
            metrics_path: "m".into(),
        };
        vec![
            (C::GetInstance, always),
            (C::GetVersion, always),
            (C::GetConfig, always),
            (C::GetMachineConfig, always),
            (C::GetMetadata, always),
            (C::GetMetrics { open_metrics: true }, always),
            (C::PutMetadata(Value::Null), always),
            (C::PatchMetadata(Value::Null), always),
            (C::PutBootSource(Default::default()), before),
            (C::PutMachineConfig(Default::default()), before),
            (
                C::PatchMachineConfig(MachineConfigUpdate::default()),
                before,
            ),
            (C::PutCpuConfig(Default::default()), before),
            (C::PutDrive(Box::default()), before),
            (C::PutNetworkInterface(Box::default()), before),
            (C::PutVsock(Default::default()), before),
            (C::PutEntropy(Default::default()), before),
            (C::PutSerial(Default::default()), before),
            (C::PutLogger(Default::default()), before),
            (C::PutMetrics(metrics), before),
            (C::PutMetadataConfig(mmds), before),
            (C::Start, before),
            (C::Pause, after),
            (C::Resume, after),
            (C::SendCtrlAltDel, after),
            (C::FlushMetrics, after),
            (C::PatchDrive(DriveUpdate::default()), after),
            (
                C::SetLink {
                    iface_id: "a".into(),
                    up: true,
                },
                after,
            ),
            (
                C::PatchNetworkInterface(NetworkInterfaceUpdate::default()),
                after,
            ),
            (C::CreateSnapshot(SnapshotCreate::default()), paused),
            (C::CreateSnapshot(live), after),
            (C::LoadSnapshot(Box::default()), before),
        ]
    }

    #[test]
    fn the_whole_table() {
        for (command, [not_started, running, paused]) in table() {
            for (state, want) in [
                (NotStarted, not_started),
                (Running, running),
                (Paused, paused),
                (Ended, false),
            ] {
                let got = permit(state, &command);
                assert_eq!(got.is_ok(), want, "{state:?} + {command:?}");
                if let Err(refusal) = got {
                    let text = refusal.to_string();
                    let begins = format!("cannot {command}: the ");
                    assert!(text.starts_with(&begins), "{text}");
                    assert!(text.contains(';'), "{text} does not say what to do");
                }
            }
        }
    }

    #[test]
    fn every_command_is_in_the_table() {
        let kinds: std::collections::HashSet<_> = table()
            .iter()
            .map(|(c, _)| std::mem::discriminant(c))
            .collect();
        // Grows with the enum: `when` does not compile without the new one, and this counts its arms.
        assert_eq!(kinds.len(), 30);
        let texts: std::collections::HashSet<_> =
            table().iter().map(|(c, _)| c.to_string()).collect();
        assert_eq!(texts.len(), 30, "two commands are told in the same words");
    }

    #[test]
    fn states_are_told_in_the_words_of_the_api() {
        for (state, word) in [
            (NotStarted, "Not started"),
            (Running, "Running"),
            (Paused, "Paused"),
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), word);
        }
    }
}
