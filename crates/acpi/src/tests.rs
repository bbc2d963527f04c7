//! Tables are read back by hand here, as a kernel reads them: by address, length and checksum.

use std::io::Write;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const AT: u64 = 0xe_0000;

pub(crate) fn board(cpus: u32) -> Board {
    Board {
        cpu_apic_ids: (0..cpus).collect(),
        io_apic_addr: 0xfec0_0000,
        power: PowerRegisters {
            sleep_control_port: 0x600,
            sleep_status_port: 0x601,
            reset_port: 0x602,
            reset_value: 1,
        },
        power_button_gsi: 5,
        generation: Generation {
            id_addr: 0xf_0000,
            clock_addr: 0xf_1000,
            gsi: 3,
        },
        pci: None,
        nodes: vec![
            node(b"COM1", "PNP0501", vec![(0x3f8, 8)], vec![], Some(4)),
            node(b"PANI", "QEMU0001", vec![(0x505, 1)], vec![], None),
            node(
                b"V000",
                "LNRO0005",
                vec![],
                vec![(0xc000_1000, 0x1000)],
                Some(6),
            ),
            node(b"HIGH", "ALVE0001", vec![], vec![(1 << 40, 1 << 33)], None),
        ],
    }
}

fn node(
    name: &[u8; 4],
    hid: &'static str,
    ports: Vec<(u16, u8)>,
    memory: Vec<(u64, u64)>,
    gsi: Option<u32>,
) -> DeviceNode {
    DeviceNode {
        name: *name,
        hid,
        uid: 0,
        ports,
        memory,
        gsi,
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |n, b| n.wrapping_add(*b))
}

/// The table at a guest address, its length and checksum verified.
fn table_at(tables: &Tables, addr: u64, signature: &[u8; 4]) -> Vec<u8> {
    let from = &tables.bytes[(addr - tables.load_addr) as usize..];
    assert_eq!(&from[..4], signature);
    let len = number(&from[4..8]) as usize;
    assert_eq!(
        sum(&from[..len]),
        0,
        "checksum of {}",
        signature.escape_ascii()
    );
    from[..len].to_vec()
}

/// All tables by following the pointers from the root: FADT, MADT, DSDT.
fn walk(tables: &Tables) -> [Vec<u8>; 3] {
    let rsdp = &tables.bytes[(tables.rsdp_addr - tables.load_addr) as usize..][..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(
        (sum(&rsdp[..20]), sum(rsdp), rsdp[15], rsdp[20]),
        (0, 0, 2, 36)
    );
    let xsdt = table_at(tables, number(&rsdp[24..32]), b"XSDT");
    assert!(matches!((xsdt.len() - 36) / 8, 2 | 3));
    let fadt = table_at(tables, number(&xsdt[36..44]), b"FACP");
    let madt = table_at(tables, number(&xsdt[44..52]), b"APIC");
    let dsdt = table_at(tables, number(&fadt[140..148]), b"DSDT");
    let end = number(&fadt[140..148]) - tables.load_addr + dsdt.len() as u64;
    assert_eq!(
        end,
        tables.bytes.len() as u64,
        "nothing behind the last table"
    );
    [fadt, madt, dsdt]
}

fn pci_root() -> PciRoot {
    PciRoot {
        ecam_addr: 0xe800_0000,
        buses: 1,
        windows: vec![(0xd000_0000, 0x1000_0000), (1 << 40, 1 << 32)],
    }
}

#[test]
fn a_pci_bus_has_one_more_table() {
    let mut board = board(3);
    board.pci = Some(pci_root());
    let tables = build(&board, AT).unwrap();
    walk(&tables);
    let rsdp = &tables.bytes[..36];
    let xsdt = table_at(&tables, number(&rsdp[24..32]), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let mcfg = table_at(&tables, number(&xsdt[52..60]), b"MCFG");
    assert_eq!(mcfg.len(), 44 + 16);
    assert_eq!((mcfg[8], number(&mcfg[36..44])), (1, 0));
    assert_eq!(number(&mcfg[44..52]), 0xe800_0000);
    // Segment, first bus, last bus, reserved.
    assert_eq!(mcfg[52..60], [0; 8]);
    // Nothing of it in the older table: no pins, so no bus and no routes.
    let without = super::tests::board(3);
    assert_eq!(mp_table(&board), mp_table(&without));
}

#[test]
fn a_pci_bus_that_cannot_be_is_refused() {
    type Change = fn(&mut PciRoot);
    let cases: [(Change, &str); 7] = [
        (|p| p.ecam_addr += 0x8_0000, "1 buses at 0xe8080000"),
        (
            |p| {
                p.ecam_addr = !0xf_ffff;
                p.buses = 2;
            },
            "2 buses",
        ),
        (|p| p.buses = 0, "0 buses"),
        (|p| p.buses = 257, "257 buses"),
        (|p| p.windows.clear(), "a window for BARs"),
        (|p| p.windows = vec![(0xd000_0000, 0)], "\"PCI0\""),
        (|p| p.windows[1] = (u64::MAX, 2), "\"PCI0\""),
    ];
    for (change, want) in cases {
        let mut board = board(1);
        let mut pci = pci_root();
        change(&mut pci);
        board.pci = Some(pci);
        let e = build(&board, AT).unwrap_err().to_string();
        assert!(e.contains(want), "{e}");
    }
    let mut taken = board(1);
    taken.nodes[0].name = *b"PCI0";
    assert!(build(&taken, AT).is_err());
}

#[test]
fn every_table_is_found_and_sums_to_zero() {
    for cpus in [1, 2, 64, 254, 300] {
        let tables = build(&board(cpus), AT).unwrap();
        assert!(tables.bytes.len() < MAX_SIZE_BYTES);
        walk(&tables);
    }
}

#[test]
fn fadt_says_hardware_reduced_and_where_the_registers_are() {
    let [fadt, ..] = walk(&build(&board(1), AT).unwrap());
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    let flags = number(&fadt[112..116]);
    // WBINVD, PWR_BUTTON, SLP_BUTTON, RESET_REG_SUP, HEADLESS, HW_REDUCED_ACPI: table 5.10.
    assert_eq!(flags, 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 12 | 1 << 20);
    assert_eq!(
        number(&fadt[109..111]),
        1 << 2 | 1 << 5,
        "no VGA, no CMOS clock"
    );
    for (offset, want) in [(116, 0x602), (244, 0x600), (256, 0x601)] {
        assert_eq!(
            fadt[offset..offset + 4],
            [1, 8, 0, 1],
            "one byte in port space"
        );
        assert_eq!(number(&fadt[offset + 4..offset + 12]), want);
    }
    assert_eq!(fadt[128], 1, "reset value");
}

/// Type and content of every structure of a MADT.
fn structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &madt[44..];
    let mut all = Vec::new();
    while let [kind, len, ..] = *rest {
        let (one, next) = rest.split_at(len as usize);
        all.push((kind, one[2..].to_vec()));
        rest = next;
    }
    all
}

#[test]
fn madt_names_every_processor_once_in_the_form_its_id_needs() {
    let mut board = board(2);
    board.cpu_apic_ids = vec![0, 7, 254, 255, 256, 70_000];
    let [_, madt, _] = walk(&build(&board, AT).unwrap());
    assert_eq!(number(&madt[36..40]), 0xfee0_0000);
    assert_eq!(number(&madt[40..44]), 0, "PCAT_COMPAT clear");
    let all = structures(&madt);
    assert_eq!(all[0], (0, vec![0, 0, 1, 0, 0, 0]));
    assert_eq!(all[2], (0, vec![254, 254, 1, 0, 0, 0]));
    assert_eq!(
        all[3],
        (9, vec![0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0])
    );
    assert_eq!(all[5].1[2..6], 70_000u32.to_le_bytes());
    assert_eq!(all[5].1[10..14], 70_000u32.to_le_bytes());
    assert_eq!(all[6], (1, vec![0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]));
    assert_eq!(all.len(), 7);
}

#[test]
fn a_board_that_cannot_be_described_is_refused_by_name() {
    type Change = fn(&mut Board);
    let cases: [(Change, &str); 16] = [
        (|b| b.cpu_apic_ids.clear(), "0 processors"),
        (|b| b.cpu_apic_ids = (0..1025).collect(), "1025 processors"),
        (|b| b.cpu_apic_ids = vec![3, 3], "local APIC id 3"),
        (|b| b.nodes[0].name = *b"1COM", "\"1COM\""),
        (|b| b.nodes[0].name = *b"co\xffM", "name is four of"),
        (
            |b| b.nodes[1].name = *b"COM1",
            "\"COM1\" (QEMU0001): the name is taken",
        ),
        (|b| b.nodes[1].name = *b"PWRB", "the name is taken"),
        (|b| b.nodes[1].name = *b"VGEN", "the name is taken"),
        (|b| b.generation.gsi = 5, "interrupt 5"),
        (|b| b.generation.id_addr += 4, "at 0xf0004"),
        // The last bytes of it, in the RSDP.
        (|b| b.generation.id_addr = AT - 8, "at 0xdfff8"),
        (|b| b.generation.clock_addr = AT, "VMClock at 0xe0000"),
        (|b| b.generation.clock_addr += 8, "VMClock at 0xf1008"),
        (|b| b.nodes[1].name = *b"VCLK", "the name is taken"),
        (|b| b.nodes[0].hid = "pnp0501", "\"pnp0501\""),
        (
            |b| b.nodes[0].ports = vec![(0xfff9, 8)],
            "port range 0xfff9+0x8",
        ),
    ];
    for (change, want) in cases {
        let mut board = board(1);
        change(&mut board);
        let e = build(&board, AT).unwrap_err().to_string();
        assert!(e.contains(want), "{e}");
    }
    let mut wraps = board(1);
    wraps.nodes[0].memory = vec![(u64::MAX, 2)];
    assert!(matches!(
        build(&wraps, AT),
        Err(AcpiError::BadRange {
            space: "memory",
            ..
        })
    ));
    for at in [AT + 8, 0xf_ff00, !15] {
        assert!(
            matches!(build(&board(1), at), Err(AcpiError::Place { .. })),
            "{at:#x}"
        );
    }
    let mut many = board(1024);
    many.nodes = (0..1000)
        .map(|i| {
            let name: [u8; 4] = format!("N{i:03}").into_bytes().try_into().unwrap();
            node(&name, "PNP0501", vec![(0x3f8, 8)], vec![], Some(4))
        })
        .collect();
    assert!(matches!(build(&many, AT), Err(AcpiError::TooLarge(_))));
}

/// What the independent compiler makes of our AML, or nothing where it is not installed.
fn disassemble(dsdt: &[u8]) -> Option<String> {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!(
            "SKIPPED: iasl is not installed (apt install acpica-tools): AML is not read back"
        );
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let aml = dir.path().join("dsdt.aml");
    std::fs::File::create(&aml)
        .unwrap()
        .write_all(dsdt)
        .unwrap();
    let run = |args: &[&str]| {
        let out = Command::new("iasl")
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "iasl {args:?}: {said}");
        said.into_owned()
    };
    run(&["-d", "dsdt.aml"]);
    let said = run(&["-ve", "dsdt.dsl"]);
    assert!(said.contains("0 Errors"), "{said}");
    Some(std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap())
}

#[test]
fn the_aml_reads_back_as_what_was_meant() {
    let mut board = board(64);
    board.pci = Some(pci_root());
    let [.., dsdt] = walk(&build(&board, AT).unwrap());
    let Some(text) = disassemble(&dsdt) else {
        return;
    };
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for want in [
        "Name (_S5, Package (0x04)",
        "Device (C03F) { Name (_HID, \"ACPI0007\"",
        "Name (_HID, \"ACPI0013\"",
        "Method (_EVT, 1, Serialized)",
        "If ((Arg0 == 0x05)) { Notify (PWRB, 0x80)",
        "If ((Arg0 == 0x03)) { Notify (VGEN, 0x80) // Status Change Notify (VCLK, 0x80)",
        "Device (VCLK) { Name (_HID, \"AMZNC10C\")",
        "Name (_CID, \"VMCLOCK\")",
        "Memory32Fixed (ReadWrite, 0x000F1000, // Address Base 0x00001000,",
        "Device (VGEN) { Name (_HID, \"ALVE0001\")",
        "Name (_CID, Package (0x02) // _CID: Compatible ID { \"VM_Gen_Counter\", \"VMGENCTR\" })",
        "Name (_DDN, \"VM_Gen_Counter\")",
        "Name (ADDR, Package (0x02) { 0x000F0000, Zero })",
        "Name (_HID, \"PNP0C0C\"",
        "IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum 0x01, // Alignment 0x08,",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }",
        "Memory32Fixed (ReadWrite, 0xC0001000, // Address Base 0x00001000,",
        "QWordMemory (",
        "Device (PCI0) { Name (_HID, \"PNP0A08\"",
        "Name (_CID, \"PNP0A03\"",
        "Name (_CBA, 0xE8000000)",
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, // Granularity 0x0000, // Range Minimum 0x0000, // Range Maximum",
        "0x00000000D0000000, // Range Minimum 0x00000000DFFFFFFF, // Range Maximum",
        "Device (ECAM) { Name (_HID, \"PNP0C02\"",
        "Memory32Fixed (ReadWrite, 0xE8000000, // Address Base 0x00100000,",
    ] {
        assert!(flat.contains(want), "{want} is not in:\n{text}");
    }
}

proptest! {
    #[test]
    fn any_board_is_refused_or_described_soundly(
        ids in prop::collection::vec(any::<u32>(), 0..300),
        names in prop::collection::vec("[A-Z0-9_a]{4}", 0..20),
        ports in prop::collection::vec(any::<(u16, u8)>(), 0..4),
        memory in prop::collection::vec(any::<(u64, u64)>(), 0..4),
        gsi in any::<u32>(),
        at in (0u64..0x1_0000).prop_map(|n| n * 16),
    ) {
        let mut board = board(1);
        board.cpu_apic_ids = ids.clone();
        board.power_button_gsi = gsi;
        board.nodes = names
            .iter()
            .map(|n| {
                let name = n.as_bytes().try_into().unwrap();
                node(name, "PNP0501", ports.clone(), memory.clone(), Some(gsi))
            })
            .collect();
        if let Ok(tables) = build(&board, at) {
            let [_, madt, _] = walk(&tables);
            prop_assert_eq!(structures(&madt).len(), ids.len() + 1);
            prop_assert!(tables.load_addr + tables.bytes.len() as u64 <= 1 << 20);
        }
    }
}
