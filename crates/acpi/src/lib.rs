//! ACPI tables as bytes.
