//! Many VMs on one host at once, by a user without rights where such a one has guests.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use serde_json::Value;

use super::images::Home;
use super::interrupted::{folders, processes};
use crate::harness::{in_the_lab, kvm_is_open_to_all};

/// How many there are.
const VMS: usize = 50;
/// In the lab, whose processors are emulated and take ten seconds for one of them. 50 pass there, too (`ALVEOLE_TEST_VMS`), in nine minutes.
const VMS_IN_THE_LAB: usize = 10;
/// Of each: a distribution's kernel, unpacked, is half of it.
const MEMORY: &str = "96M";
/// How many commands are at work at once.
const AT_ONCE: usize = 4;

/// What `work` gives for each name, a few at a time.
fn each<T: Send>(names: &[String], work: impl Fn(&str) -> T + Sync) -> Vec<T> {
    let (left, done) = (Mutex::new(names.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().next();
                    let Some(name) = next else { return };
                    let it = work(name);
                    done.lock().unwrap().push(it);
                }
            });
        }
    });
    done.into_inner().unwrap()
}

/// The names of VMs and the one state in which all of them are.
fn listed(home: &Home, state: &str) -> Vec<String> {
    let listed = home.does(&["ps", "-a", "--format", "json"]);
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let mut names = Vec::new();
    for vm in listed {
        assert_eq!(vm["state"], state, "{vm}");
        names.push(vm["name"].as_str().unwrap().to_owned());
    }
    names.sort();
    names
}

/// The sockets below a folder.
fn sockets(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(sockets(&entry.path()));
        } else if std::os::unix::fs::FileTypeExt::is_socket(&kind) {
            found.push(entry.path().display().to_string());
        }
    }
    found
}

#[test]
fn many_vms_are_started_listed_entered_and_stopped() {
    let home = if kvm_is_open_to_all() {
        Home::of_nobody()
    } else {
        Home::new()
    };
    let Some(mut home) = home else { return };
    if !home.strip_agent() {
        return;
    }
    let said = std::env::var("ALVEOLE_TEST_VMS").ok();
    let usual = if in_the_lab() { VMS_IN_THE_LAB } else { VMS };
    let count = said.map_or(usual, |said| said.parse().unwrap());
    let names: Vec<_> = (0..count).map(|number| format!("vm{number:02}")).collect();
    let begun = Instant::now();
    let took = |what: &str| {
        let seconds = begun.elapsed().as_secs_f64();
        println!("{count} VMs {what} after {seconds:.1} s");
    };
    each(&names, |name| {
        let before = ["-d", "--memory", MEMORY, "--name", name];
        home.does(&home.run(&before, &["sleep", "100000"]))
    });
    took("started");
    assert_eq!(listed(&home, "running"), names);
    let running = home.does(&["ps", "--format", "json"]);
    let running: Vec<Value> = serde_json::from_str(&running).unwrap();
    assert_eq!(running.len(), count);
    assert!(sockets(&home.dir.path().join("home/run")).len() >= count);
    let entered = each(&names, |name| {
        (name.to_owned(), home.does(&["exec", name, "hostname"]))
    });
    for (name, said) in entered {
        assert_eq!(said, name);
    }
    took("entered");
    each(&names, |name| home.does(&["stop", name]));
    took("stopped");
    assert_eq!(home.does(&["ps", "-q"]), "");
    assert_eq!(listed(&home, "exited (143)"), names);
    let all: Vec<_> = names.iter().map(String::as_str).collect();
    home.does(&[&["rm"], &all[..]].concat());
    took("removed");
    // A keeper ends just after what it kept.
    home.wait_until(20, "end of all processes", || processes(&home).is_empty());
    assert_eq!(home.does(&["ps", "-aq"]), "");
    assert_eq!(folders(&home), Vec::<String>::new());
    assert_eq!(sockets(&home.dir.path().join("home")), Vec::<String>::new());
}
