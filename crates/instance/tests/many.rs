//! Many VMs in one folder: all are found, each in its state, by those who look while others change things.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeSet;
use std::path::Path;
use std::thread;

use alveole_agent_protocol::Process;
use alveole_instance::{
    Event, Happened, InstanceError, KeeperLock, Limits, Record, Restart, State, Vm, Vms,
};

const MANY: usize = 500;

fn record() -> Record {
    Record {
        version: Record::VERSION,
        id: Record::new_id().unwrap(),
        image: "debian:12".into(),
        image_id: String::new(),
        created_ms: 1,
        root_disk: "/x".into(),
        kernel: "k".into(),
        cpus: 1,
        memory_mib: 64,
        disk_bytes: None,
        read_only: true,
        hostname: "x".into(),
        network: Vec::new(),
        process: Process {
            args: vec!["true".into()],
            ..Process::default()
        },
        stop_signal: 15,
        labels: [("a".to_owned(), "b".to_owned())].into(),
        restart: Restart::No,
        remove: false,
        shm_bytes: None,
        cpu_config: None,
        published_free: Vec::new(),
        volumes: Vec::new(),
        limits: Limits::default(),
    }
}

fn vms(dir: &Path) -> Vms {
    Vms::new(&dir.join("vms"), &dir.join("run"))
}

fn events(vms: &Vms) -> Vec<Event> {
    let mut reader = vms.events().unwrap();
    std::iter::from_fn(|| reader.next_event().unwrap()).collect()
}

#[test]
fn all_of_many_are_found_each_in_its_state() {
    let dir = tempfile::tempdir().unwrap();
    let vms = vms(dir.path());
    let all: Vec<Vm> = (0..MANY)
        .map(|number| vms.create(&format!("vm-{number}"), &record()).unwrap())
        .collect();
    // A third is kept, a third has ended, a third was never started.
    let held: Vec<KeeperLock> = all.iter().step_by(3).map(|vm| vm.lock().unwrap()).collect();
    for vm in all.iter().skip(1).step_by(3) {
        std::fs::write(vm.at("ended.json"), r#"{"status":3,"at_ms":7}"#).unwrap();
    }
    let listed = vms.list().unwrap();
    let ids =
        |vms: &[Vm]| -> BTreeSet<String> { vms.iter().map(|vm| vm.record.id.clone()).collect() };
    assert_eq!(ids(&listed), ids(&all));
    let mut counts = [0; 4];
    for vm in &listed {
        counts[match vm.state().unwrap() {
            State::Kept(_) => 0,
            State::Ended(ended) => {
                assert_eq!(ended.status, 3);
                1
            }
            State::Created => 2,
            State::Lost => 3,
        }] += 1;
    }
    assert_eq!(counts, [held.len(), 167, 166, 0]);
    assert_eq!(counts.iter().sum::<usize>(), MANY);
    assert_eq!(events(&vms).len(), MANY);
    // Looking takes nobody for a keeper, however many look.
    drop(held);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let kept = vms.list().unwrap();
                assert!(kept.iter().all(|vm| !vm.is_kept().unwrap()));
            });
        }
    });
    assert_eq!(vms.find(&all[7].record.id).unwrap().name, "vm-7");
}

#[test]
fn what_happens_to_a_vm_is_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let vms = vms(dir.path());
    let vm = vms.create("web", &record()).unwrap();
    let id = vm.record.id.clone();
    vm.rename("other").unwrap();
    let vm = vms.find("other").unwrap();
    // As a killed keeper leaves it.
    std::fs::write(vm.at("phase.json"), "{}").unwrap();
    let lock = vm.lock().unwrap();
    vm.remove(&lock).unwrap();
    let seen: Vec<_> = events(&vms)
        .into_iter()
        .inspect(|event| assert_eq!((&event.id, &*event.image), (&id, "debian:12")))
        .map(|event| (event.name, event.what))
        .collect();
    let (web, other) = ("web".to_owned(), "other".to_owned());
    let renamed = Happened::Renamed { from: web.clone() };
    assert_eq!(
        seen,
        [
            (web, Happened::Created),
            (other.clone(), renamed),
            (other.clone(), Happened::Lost),
            (other, Happened::Removed),
        ]
    );
}

#[test]
fn changes_at_the_same_time_are_all_made() {
    let dir = tempfile::tempdir().unwrap();
    let vms = vms(dir.path());
    let vm = vms.create("web", &record()).unwrap();
    thread::scope(|scope| {
        for number in 0..8 {
            let vm = &vm;
            scope.spawn(move || {
                for _ in 0..10 {
                    vm.change(|record| {
                        record.memory_mib += 1;
                        record.labels.insert(format!("by-{number}"), String::new());
                        Ok::<_, InstanceError>(())
                    })
                    .unwrap();
                }
            });
        }
    });
    let now = vm.again().unwrap();
    assert_eq!(now.record.memory_mib, 64 + 80);
    assert_eq!(now.record.labels.len(), 9);
    // What fails changes nothing.
    let failed = vm.change(|record| {
        record.memory_mib = 1;
        Err(InstanceError::Name("no".into()))
    });
    assert!(failed.is_err());
    assert_eq!(vm.again().unwrap().record, now.record);
    // One of the same name is another one.
    let lock = now.lock().unwrap();
    now.remove(&lock).unwrap();
    let gone = vm.change(|_| Ok::<_, InstanceError>(())).unwrap_err();
    assert!(matches!(gone, InstanceError::Unknown(_)), "{gone}");
    vms.create("web", &record()).unwrap();
    assert!(vm.again().is_err());
}
