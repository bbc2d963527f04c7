//! Real Linux guests under real KVM, through the built `alveole-vmm`: what a person who runs it relies on.
//!
//! `tests/README.md` says how to run them, here or in the lab.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod api_client;
mod harness;

#[path = "guest/agent.rs"]
mod agent;
#[path = "guest/api.rs"]
mod api;
#[path = "guest/boot.rs"]
mod boot;
#[path = "guest/console.rs"]
mod console;
#[path = "guest/cpu.rs"]
mod cpu;
#[path = "guest/debian.rs"]
mod debian;
#[path = "guest/diffs.rs"]
mod diffs;
#[path = "guest/disks.rs"]
mod disks;
#[path = "guest/ends.rs"]
mod ends;
#[path = "guest/files.rs"]
mod files;
#[path = "guest/forks.rs"]
mod forks;
#[path = "guest/huge_pages.rs"]
mod huge_pages;
#[path = "guest/images.rs"]
mod images;
#[path = "guest/instants.rs"]
mod instants;
#[path = "guest/interrupted.rs"]
mod interrupted;
#[path = "guest/kept.rs"]
mod kept;
#[path = "guest/loads.rs"]
mod loads;
#[path = "guest/made.rs"]
mod made;
#[path = "guest/many.rs"]
mod many;
#[path = "guest/metadata.rs"]
mod metadata;
#[path = "guest/network.rs"]
mod network;
#[path = "guest/networks.rs"]
mod networks;
#[path = "guest/packed.rs"]
mod packed;
#[path = "guest/pauses.rs"]
mod pauses;
#[path = "guest/podman.rs"]
mod podman;
#[path = "guest/rounds.rs"]
mod rounds;
#[path = "guest/sandbox.rs"]
mod sandbox;
#[path = "guest/sees.rs"]
mod sees;
#[path = "guest/snapshots.rs"]
mod snapshots;
#[path = "guest/space.rs"]
mod space;
#[path = "guest/takes.rs"]
mod takes;
#[path = "guest/terminal.rs"]
mod terminal;
#[path = "guest/traffic.rs"]
mod traffic;
#[path = "guest/vhost.rs"]
mod vhost;
#[path = "guest/volumes.rs"]
mod volumes;
#[path = "guest/vsock.rs"]
mod vsock;
