//! Who a copy of a VM is: what its guest must become before anybody is given it, as it goes on in the middle of what another one did.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Guest};
use alveole_agent_protocol::{Refusal, Renewal, Renewed, RenewedInterface};

use crate::folder::now_ns;
use crate::stages::reached;
use crate::{InstanceError, Vm};

/// Random bytes for the guest's kernel: as many as seed its generator, and as many again.
const ENTROPY_BYTES: usize = 64;
/// Between two tries to reach the agent of a guest that was just loaded.
const AGAIN: Duration = Duration::from_millis(2);
/// The part of a renewal that is the user's and not the guest's own.
const HOOKS: &str = "hooks";

/// What a copy is, and no other one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What the guest calls itself.
    pub hostname: String,
    /// 32 hexadecimal digits (machine-id(5)).
    pub machine_id: String,
    /// Its network devices.
    pub interfaces: Vec<RenewedInterface>,
}

impl Identity {
    /// An identity with a new machine-id. `was` are the words about networks (`alveole.net=MAC,...`, as in
    /// [`Setup::network`](alveole_agent_protocol::Setup::network)) that the guest has been set up by, `now` those for the copy: a word for each
    /// device, in the same order. Who makes the words has taken the addresses in them.
    ///
    /// # Errors
    ///
    /// The copy has other devices than the guest, or the host gives no random bytes.
    pub fn new(hostname: &str, was: &[String], now: &[String]) -> Result<Self, InstanceError> {
        if was.len() != now.len() {
            return Err(InstanceError::OtherDevices {
                was: was.len(),
                now: now.len(),
            });
        }
        let interface = |(was, now): (&String, &String)| {
            let mac = was
                .strip_prefix("alveole.net=")
                .and_then(|rest| rest.split(',').next());
            RenewedInterface {
                // A word that is none is refused by the agent, which shows it.
                is: mac.unwrap_or(was).into(),
                becomes: now.clone(),
            }
        };
        Ok(Self {
            hostname: hostname.into(),
            machine_id: machine_id()?,
            interfaces: was.iter().zip(now).map(interface).collect(),
        })
    }

    /// The words about networks that are so from then on.
    pub(crate) fn words(&self) -> Vec<String> {
        let words = self.interfaces.iter().map(|i| i.becomes.clone());
        words.collect()
    }
}

/// A random machine-id, which is a UUID of version 4 as well, as machine-id(5) asks for new ones.
fn machine_id() -> Result<String, InstanceError> {
    let mut bytes = [0; 16];
    fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn fill(bytes: &mut [u8]) -> Result<(), InstanceError> {
    getrandom::fill(bytes)
        .map_err(|e| InstanceError::file("read", "/dev/urandom")(io::Error::other(e.to_string())))
}

/// Has the guest of a VM, whose processors run, become what `identity` says, with new random numbers and this host's time, and run its hooks within
/// `hooks`, if they are to run. Its agent has `within` for each answer.
///
/// What failed of hooks is in the answer ([`Renewed::failures`]); with anything else that fails the guest is not to be given to anybody.
///
/// # Errors
///
/// The agent does not answer, is too old, or could not do all of it.
pub fn renew(
    vm: &Vm,
    identity: &Identity,
    within: Duration,
    hooks: Option<Duration>,
) -> Result<Renewed, InstanceError> {
    let failed = |why: String| InstanceError::NotRenewed {
        name: vm.name.clone(),
        why,
    };
    let mut entropy = vec![0; ENTROPY_BYTES];
    fill(&mut entropy)?;
    let renewal = Renewal {
        entropy,
        unix_ns: Some(now_ns()),
        hostname: Some(identity.hostname.clone()),
        machine_id: Some(identity.machine_id.clone()),
        interfaces: identity.interfaces.clone(),
        hooks_ms: hooks.map(|time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX)),
    };
    let guest = Guest::new(&vm.socket("vsock"), within);
    let begun = Instant::now();
    let renewed = loop {
        match guest.renew(&renewal) {
            // A guest that hears of its new connections before it has ended the old ones ends those, too.
            Err(AgentError::Ended | AgentError::NoAgent { .. }) if begun.elapsed() < within => {
                thread::sleep(AGAIN);
            }
            done => break done,
        }
    };
    let renewed = renewed.map_err(|e| match e {
        AgentError::Refused(refusal) if refusal.code == Refusal::UNKNOWN_REQUEST => failed(
            "its agent is older than this program and does not know how; start the guest that it is a copy of anew"
                .into(),
        ),
        other => failed(other.to_string()),
    })?;
    let own = Renewed {
        parts: renewed
            .parts
            .iter()
            .filter(|part| part.part != HOOKS)
            .cloned()
            .collect(),
        ..Renewed::default()
    };
    let failures = own.failures();
    if !failures.is_empty() {
        return Err(failed(failures.join("; ")));
    }
    // An agent that forgets a part, or a guest that speaks for its agent, has not done it.
    let asked = 4 + usize::from(!renewal.interfaces.is_empty());
    if own.parts.len() < asked {
        return Err(failed(format!(
            "its agent tells of {} of {asked} parts",
            own.parts.len()
        )));
    }
    reached("other");
    // The time that it was told was late by as long as it was under way.
    match guest.correct_clock() {
        Ok(off) => log::debug!("the clock of '{}' is at most {off:?} off", vm.name),
        Err(AgentError::Refused(refusal)) if refusal.code == Refusal::UNKNOWN_REQUEST => {}
        Err(e) => return Err(failed(format!("its clock cannot be corrected: {e}"))),
    }
    Ok(renewed)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::thread;

    use alveole_agent_client::Session;
    use alveole_agent_protocol::{Answer, RenewedPart, Request};

    use super::*;
    use crate::folder::test_vm;

    const WITHIN: Duration = Duration::from_millis(700);

    /// Takes a session, as a monitor with an agent behind it does.
    fn taken(listener: &UnixListener) -> Session {
        use std::io::{Read, Write};
        let (mut connection, _) = listener.accept().unwrap();
        let mut line = [0; "CONNECT 1024\n".len()];
        connection.read_exact(&mut line).unwrap();
        connection.write_all(b"OK 1\n").unwrap();
        Session::begin(connection, Duration::from_secs(5)).unwrap()
    }

    /// A monitor, with an agent behind it that answers once, and then says what its clock is: an hour behind.
    fn agent(
        vm: &Vm,
        answer: impl FnOnce(&Renewal) -> Option<Answer> + Send + 'static,
    ) -> mpsc::Receiver<Renewal> {
        let listener = UnixListener::bind(vm.socket("vsock")).unwrap();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut session = taken(&listener);
            let Request::Renew(renewal) = session.request().unwrap() else {
                panic!("another request");
            };
            let answer = answer(&renewal);
            tell.send(*renewal).unwrap();
            match answer {
                Some(answer) => session.answer_with(&answer).unwrap(),
                None => thread::sleep(WITHIN * 2),
            }
            let mut behind_ns = 3_600_000_000_000;
            loop {
                let mut session = taken(&listener);
                let Request::StepClock { by_ns } = session.request().unwrap() else {
                    panic!("another request");
                };
                behind_ns -= by_ns;
                if by_ns != 0 {
                    assert!(behind_ns.abs() < 1_000_000_000, "{behind_ns}");
                }
                let unix_ns = now_ns().saturating_add_signed(-behind_ns);
                session.answer_with(&Answer::Clock { unix_ns }).unwrap();
            }
        });
        told
    }

    fn part(part: &str, failed: Option<&str>) -> RenewedPart {
        RenewedPart {
            part: part.into(),
            failed: failed.map(Into::into),
            remark: None,
        }
    }

    fn done(parts: &[(&str, Option<&str>)]) -> Answer {
        Answer::Renewed(Box::new(Renewed {
            parts: parts
                .iter()
                .map(|(name, failed)| part(name, *failed))
                .collect(),
            ..Renewed::default()
        }))
    }

    const ALL: [(&str, Option<&str>); 5] = [
        ("entropy", None),
        ("clock", None),
        ("hostname", None),
        ("machine-id", None),
        ("network", None),
    ];

    fn identity() -> Identity {
        let was = ["alveole.net=02:00:00:00:00:01,ip=10.0.0.2/24".to_owned()];
        let now = ["alveole.net=02:00:00:00:00:02,ip=10.0.0.3/24".to_owned()];
        Identity::new("copy", &was, &now).unwrap()
    }

    #[test]
    fn every_identity_is_another_one() {
        let ids: HashSet<_> = (0..100).map(|_| identity().machine_id).collect();
        assert_eq!(ids.len(), 100);
        for id in &ids {
            assert_eq!(id.len(), 32);
            assert!(id.bytes().all(|c| b"0123456789abcdef".contains(&c)), "{id}");
            assert!(
                id.as_bytes()[12] == b'4' && b"89ab".contains(&id.as_bytes()[16]),
                "{id}"
            );
        }
        let error = Identity::new("copy", &["a".into()], &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains('1') && error.contains('0'), "{error}");
    }

    #[test]
    fn the_agent_is_told_who_the_guest_is() {
        let dir = tempfile::tempdir().unwrap();
        let vm = test_vm(dir.path());
        let mut entropies = HashSet::new();
        for _ in 0..2 {
            let _ = std::fs::remove_file(vm.socket("vsock"));
            let identity = identity();
            let told = agent(&vm, |_| {
                let hooks = [("hooks", Some("too many"))];
                Some(done(&[&ALL[..], &hooks].concat()))
            });
            let before = now_ns();
            let hooks = Some(Duration::from_secs(3));
            let renewed = renew(&vm, &identity, WITHIN, hooks).unwrap();
            assert_eq!(renewed.failures(), ["hooks: too many"]);
            let told = told.recv().unwrap();
            assert!((before..=now_ns()).contains(&told.unix_ns.unwrap()));
            assert_eq!(told.hostname.as_deref(), Some("copy"));
            assert_eq!(told.machine_id, Some(identity.machine_id));
            assert_eq!(told.hooks_ms, Some(3000));
            assert_eq!(
                told.interfaces,
                [RenewedInterface {
                    is: "02:00:00:00:00:01".into(),
                    becomes: "alveole.net=02:00:00:00:00:02,ip=10.0.0.3/24".into(),
                }]
            );
            assert_eq!(told.entropy.len(), ENTROPY_BYTES);
            entropies.insert(told.entropy);
        }
        assert_eq!(entropies.len(), 2, "the same random bytes for two copies");
    }

    #[test]
    fn a_guest_that_is_not_somebody_else_is_an_error_with_its_name() {
        let mut network_failed = ALL;
        network_failed[4].1 = Some("no eth0\n");
        let unknown = Answer::Refused(Refusal {
            code: Refusal::UNKNOWN_REQUEST.into(),
            text: "teleport".into(),
        });
        let cases = [
            (None, "does not answer within 0.7 s"),
            (Some(unknown), "older than this program"),
            (Some(done(&network_failed)), "network: no eth0"),
            (Some(done(&ALL[1..])), "4 of 5 parts"),
            (Some(Answer::Done), "another answer"),
        ];
        for (answer, word) in cases {
            let dir = tempfile::tempdir().unwrap();
            let vm = test_vm(dir.path());
            let _told = agent(&vm, |_| answer);
            let error = renew(&vm, &identity(), WITHIN, None)
                .unwrap_err()
                .to_string();
            assert!(error.contains(word) && error.contains("'web'"), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let error = renew(&test_vm(dir.path()), &identity(), WITHIN, None).unwrap_err();
        assert!(
            error.to_string().contains("is it still running?"),
            "{error}"
        );
    }
}
