//! `cpu-config` through the real program and KVM: tiny guests ask the processor what it is, and say it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod api_client;
#[expect(dead_code, reason = "tests/bad_input.rs uses the rest")]
mod tiny_guest;

use std::fs;

use api_client::Client;
use serde_json::{Value, json};
use tiny_guest::{Bench, hang, no_kvm, power_off};

/// The description is wrong.
const CONFIG: i32 = 152;
/// The microcode revision, which a guest reads as it was set.
const MSR: &str = "0x8b";

/// Writes EAX to the serial port, the lowest byte first.
fn say_eax() -> Vec<u8> {
    // mov dx, 0x3f8; four times: out dx, al; shr eax, 8
    [
        &[0x66, 0xba, 0xf8, 0x03][..],
        &[0xee, 0xc1, 0xe8, 0x08].repeat(4),
    ]
    .concat()
}

/// Says the first leaf's ECX, its EBX, and both halves of the register.
fn says_what_it_is() -> Vec<u8> {
    let cpuid = [0xb8, 1, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2]; // mov eax, 1; xor ecx, ecx; cpuid
    let rdmsr = [0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32]; // mov ecx, 0x8b; rdmsr
    let ecx = [0x89, 0xc8]; // mov eax, ecx
    let ebx = [0x89, 0xd8]; // mov eax, ebx
    let edx = [0x89, 0xd0]; // mov eax, edx
    [
        &cpuid[..],
        &ecx,
        &say_eax(),
        &cpuid,
        &ebx,
        &say_eax(),
        &rdmsr,
        &say_eax(),
        &rdmsr,
        &edx,
        &say_eax(),
        &power_off(),
    ]
    .concat()
}

/// Runs `vm.json` with `cpu_config` in it, and reads what the guest says.
fn told(bench: &Bench, cpu_config: &Value) -> [u32; 4] {
    let text = json!({
        "boot-source": { "kernel_image_path": "kernel" },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 64 },
        "cpu-config": cpu_config,
    });
    bench.write("vm.json", text.to_string().as_bytes());
    let ended = bench.start(&["--console", "file:console"]).end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let said = fs::read(bench.file("console")).unwrap();
    fs::remove_file(bench.file("console")).unwrap();
    let words: Vec<_> = said
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    words.try_into().unwrap()
}

/// Clears x2APIC and the hypervisor's bit, which we announce, would make all APIC ids 0xff, and sets the register.
fn some_config() -> Value {
    json!({
        "kvm_capabilities": ["136", "!999999"],
        "cpuid_modifiers": [{
            "leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [
                { "register": "ecx", "bitmap": "0b0xxxxxxxxx0xxxxxxxxxxxxxxxxxxxxx" },
                { "register": "ebx", "bitmap": "0b11111111111111110101010110101010" },
            ],
        }],
        "msr_modifiers": [{
            "addr": MSR,
            "bitmap": "0b0001_0010_0011_0100_0101_0110_0111_1000_1001_1010_1011_1100_1101_1110_1111_0001",
        }],
    })
}

#[test]
fn a_guest_finds_what_the_description_says() {
    if no_kvm("a_guest_finds_what_the_description_says") {
        return;
    }
    let bench = Bench::new(&says_what_it_is());
    let [ecx, ebx, ..] = told(&bench, &Value::Null);
    assert_eq!(ecx >> 31 & 1, 1, "{ecx:#x}");
    assert_eq!(ecx >> 21 & 1, 1, "{ecx:#x}");
    assert_eq!(ebx >> 16, 2, "processor 0 of 2: {ebx:#x}");
    let there = told(&bench, &some_config());
    assert_eq!(there[0], ecx & !(1 << 31 | 1 << 21));
    assert_eq!(there[1], 0x0002_55aa, "its place stays, the rest is set");
    assert_eq!(there[2..], [0x9abc_def1, 0x1234_5678]);
    // The same from a file of its own; relative to where the program runs.
    bench.write("template.json", some_config().to_string().as_bytes());
    assert_eq!(told(&bench, &json!("template.json")), there);
}

#[test]
fn what_this_host_cannot_give_is_told_when_the_guest_is_to_start() {
    if no_kvm("what_this_host_cannot_give_is_told_when_the_guest_is_to_start") {
        return;
    }
    let bench = Bench::new(&hang());
    let running = bench.start_command(bench.command(&["--api-sock", "api", "--console", "none"]));
    let mut client = Client::at(&bench.file("api"));
    client.done(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": "kernel"}),
    );
    // A register that does not exist, and one (EFER) with a bit that means nothing.
    let wrong = json!({
        "kvm_capabilities": ["696969"],
        "cpuid_modifiers": [
            { "leaf": "0x12345678", "subleaf": "0", "flags": 0, "modifiers": [] },
        ],
        "msr_modifiers": [
            { "addr": "0xdeadbeef", "bitmap": "0b1" },
            { "addr": "0xc0000080", "bitmap": "0b1x" },
        ],
    });
    client.done("PUT", "/cpu-config", wrong);
    let why = client.refused("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    for part in [
        "capability 696969",
        "CPUID leaf 0x12345678, subleaf 0x0 cannot be changed",
        "register 0xdeadbeef cannot be changed",
        "register 0xc0000080 cannot be set to 0x",
        "take out what it names",
    ] {
        assert!(why.contains(part), "{part}\nin\n{why}");
    }
    // It can be mended.
    client.done("PUT", "/cpu-config", some_config());
    client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    let late = client.refused("PUT", "/cpu-config", some_config());
    assert!(late.contains("has been started already"), "{late}");
    let shown = &client.get("/vm/config")["cpu-config"];
    assert_eq!(shown["msr_modifiers"][0]["addr"], MSR);
    drop(running);
}

#[test]
fn a_template_is_told_as_it_was_set_and_the_last_one_counts() {
    if no_kvm("a_template_is_told_as_it_was_set_and_the_last_one_counts") {
        return;
    }
    let bench = Bench::new(&hang());
    let running = bench.start_command(bench.command(&["--api-sock", "api", "--console", "none"]));
    let mut client = Client::at(&bench.file("api"));
    let shown = |client: &mut Client| client.get("/vm/config")["cpu-config"].clone();
    assert_eq!(shown(&mut client), Value::Null);
    client.done("PUT", "/cpu-config", some_config());
    let mut want = some_config();
    // Without what is only there to be read.
    let bitmap = want["msr_modifiers"][0]["bitmap"].as_str().unwrap();
    want["msr_modifiers"][0]["bitmap"] = json!(bitmap.replace('_', ""));
    assert_eq!(shown(&mut client), want);
    // What is wrong leaves what was set.
    for (body, part) in [
        (json!({"msrs": []}), "unknown field \"msrs\""),
        (
            json!({"msr_modifiers": [{"addr": "0x1", "bitmap": "0b2"}]}),
            "'2' says nothing of a bit",
        ),
        (
            json!({"msr_modifiers": [{"addr": "0x1", "bitmap": "0b1"}, {"addr": "1", "bitmap": "0b1"}]}),
            "cannot set what the processors say of themselves: msr_modifiers name 0x1 twice",
        ),
        (
            json!({"vcpu_features": [{"index": 0, "bitmap": "0b1"}]}),
            "this is for aarch64",
        ),
        (json!("t2.json"), "expected an object"),
    ] {
        let why = client.refused("PUT", "/cpu-config", body);
        assert!(why.contains(part), "{part}\nin\n{why}");
    }
    assert_eq!(shown(&mut client), want);
    client.done("PUT", "/cpu-config", json!({}));
    let nothing = json!({"kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": []});
    assert_eq!(shown(&mut client), nothing);
    // A name takes the place of bits, and bits that of a name; who says nothing changes nothing.
    let machine =
        |template: &str| json!({"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": template});
    let silent = json!({"vcpu_count": 2, "mem_size_mib": 64});
    let named = |client: &mut Client| client.get("/machine-config")["cpu_template"].clone();
    client.done("PUT", "/machine-config", silent.clone());
    assert_eq!(shown(&mut client), nothing);
    for template in ["C3", "T2", "T2S", "T2CL", "T2A"] {
        client.done("PUT", "/machine-config", machine(template));
        assert_eq!(
            (named(&mut client), shown(&mut client)),
            (json!(template), Value::Null)
        );
        client.done("PUT", "/machine-config", silent.clone());
        client.done("PATCH", "/machine-config", json!({"vcpu_count": 1}));
        assert_eq!(named(&mut client), template);
        client.done("PUT", "/cpu-config", some_config());
        assert_eq!(
            (named(&mut client), shown(&mut client)),
            (Value::Null, want.clone())
        );
        client.done(
            "PATCH",
            "/machine-config",
            json!({"cpu_template": template}),
        );
        assert_eq!(
            (named(&mut client), shown(&mut client)),
            (json!(template), Value::Null)
        );
    }
    for nobody in ["V1N1", "T9"] {
        let why = client.refused("PUT", "/machine-config", machine(nobody));
        assert!(why.contains(nobody), "{why}");
        assert_eq!(named(&mut client), "T2A");
    }
    client.done("PUT", "/machine-config", machine("None"));
    assert_eq!(
        (named(&mut client), shown(&mut client)),
        (Value::Null, Value::Null)
    );
    client.done("PUT", "/cpu-config", some_config());
    client.done("PATCH", "/machine-config", json!({"cpu_template": "None"}));
    assert_eq!(
        (named(&mut client), shown(&mut client)),
        (Value::Null, Value::Null)
    );
    drop(running);
}

/// A host has one processor: of the templates for Intel's and that for AMD's, at least one is refused, at the start.
#[test]
fn a_template_for_another_processor_is_refused_when_the_guest_is_started() {
    if no_kvm("a_template_for_another_processor_is_refused_when_the_guest_is_started") {
        return;
    }
    let mut refused = Vec::new();
    for template in ["T2CL", "T2A"] {
        let bench = Bench::new(&hang());
        let words = ["--api-sock", "api", "--console", "none"];
        let running = bench.start_command(bench.command(&words));
        let mut client = Client::at(&bench.file("api"));
        client.done(
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": "kernel"}),
        );
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": template});
        client.done("PUT", "/machine-config", machine);
        let start = json!({"action_type": "InstanceStart"});
        let response = client.ask("PUT", "/actions", &start);
        if response.status != 204 {
            refused.push(response.fault().to_owned());
        }
        drop(running);
    }
    assert!(!refused.is_empty());
    for why in refused {
        let words = [
            "cannot start the guest: cpu_template T2",
            " only, and this host has a \"",
        ];
        assert!(words.iter().all(|w| why.contains(w)), "{why}");
    }
}

#[test]
fn mistakes_in_a_file_are_told_with_their_places() {
    let bench = Bench::new(&hang());
    let run = |value: &str| {
        let text = format!(
            "{{\"boot-source\": {{\"kernel_image_path\": \"kernel\"}},\n\"cpu-config\": {value}}}"
        );
        bench.run_text(text.as_bytes())
    };
    run(r#"{"msr_modifiers": [{"addr": 1, "bitmap": "0b12"}], "x": 1}"#).assert(
        CONFIG,
        &[
            "vm.json:2:43: \"cpu-config.msr_modifiers[0].addr\": expected a string with a number",
            "\"cpu-config.msr_modifiers[0].bitmap\": the string \"0b12\" is no bitmap",
            "unknown field \"x\"",
        ],
    );
    run("\"missing.json\"").assert(
        CONFIG,
        &["cannot read \"missing.json\"", "is the path right?"],
    );
    run("\".\"").assert(CONFIG, &["cannot read \".\"", "name a file in it"]);
    run("\"\"").assert(CONFIG, &["cannot read \"\""]);
    bench.write("bad.json", b"{\n\"cpuid_modifiers\": 7}");
    run("\"bad.json\"").assert(
        CONFIG,
        &["bad.json:2:20: \"cpuid_modifiers\": expected an array"],
    );
    bench.write("bad.json", b"[");
    run("\"bad.json\"").assert(CONFIG, &["bad.json:1:1: this is not JSON"]);
}
