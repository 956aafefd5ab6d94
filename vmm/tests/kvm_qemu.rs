//! The workload guest in a VMM that is not ours: QEMU's microvm boots the exported ELF file, its heartbeat is
//! seen through QMP, and a dump of its memory passes the check.

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use godwit_vmm::workload::{
    CheckError, Contents, FileMemory, Header, HeaderPage, MismatchKind, Order, Rate, Status, WriteUnit, WriterConfig,
    check, elf,
};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};
use tempfile::TempDir;

const QEMU: &str = "qemu-system-x86_64";
const MEMORY_BYTES: u64 = 256 << 20;
const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// `-cpu max` announces a register on some hosts that QEMU 7.2 then fails to set.
const CPU: &str = "max,-arch-capabilities";

fn main() {
    let mut arguments = Arguments::from_args();
    // Each guest takes the processors to itself.
    arguments.test_threads = Some(1);
    let missing = what_is_missing();
    if let Some(missing) = &missing {
        eprintln!("skipped: {missing}");
    }
    let trial =
        |name: &str, test: fn() -> Result<(), Failed>| Trial::test(name, test).with_ignored_flag(missing.is_some());
    let trials = vec![
        trial("qemu_runs_and_checks_word_writes_on_one_vcpu", || boots_and_checks(&config(), 1)),
        trial("qemu_runs_and_checks_page_writes_on_two_vcpus", || {
            let pages = WriterConfig {
                write: WriteUnit::Page,
                contents: Contents::Compressible,
                order: Order::HotCold,
                ..config()
            };
            boots_and_checks(&pages, 2)
        }),
        trial("qemu_runs_and_checks_flat_out_on_two_vcpus", || {
            boots_and_checks(&WriterConfig { rate: Rate::Max, write: WriteUnit::Page, ..config() }, 2)
        }),
        trial("qemu_guest_keeps_its_rate", keeps_its_rate),
        trial("qemu_guest_refuses_what_does_not_fit", refuses_what_does_not_fit),
        trial("qemu_dump_with_one_wrong_page_is_refused", wrong_page_is_found),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

fn what_is_missing() -> Option<String> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm: {error}"));
    }
    let found = Command::new(QEMU).arg("--version").stdout(Stdio::null()).status();
    found.err().map(|error| format!("{QEMU}: {error}"))
}

fn config() -> WriterConfig {
    WriterConfig {
        working_set_bytes: 64 << 20,
        fill_bytes: 96 << 20,
        rate: Rate::PagesPerSecond(30_000),
        order: Order::Random,
        write: WriteUnit::Word,
        contents: Contents::Random,
        seed: 42,
        writers: 0,
    }
}

fn boots_and_checks(config: &WriterConfig, vcpus: usize) -> Result<(), Failed> {
    let mut qemu = Qemu::boot(config, vcpus)?;
    let before = qemu.wait_until_running()?;
    sleep(Duration::from_millis(300));
    let after = qemu.header()?;
    assert_eq!(after.vcpus(), vcpus);
    for (vcpu, (before, after)) in before.heartbeats().iter().zip(after.heartbeats()).enumerate() {
        // At least every 20 µs of the time it runs; it may have to share its processor.
        assert!(after - before > 1000, "the heartbeat of vCPU {vcpu} went from {before} to {after}");
    }
    let report = check(&FileMemory::dump(&qemu.dump()?, 0)?)?;
    println!("{report:?}");
    assert_eq!(report.pages_checked, MEMORY_BYTES / 4096);
    assert_eq!((report.pages_not_ram, report.vcpus), (0, vcpus));
    assert!(report.writes > 1000, "{report:?}");
    Ok(())
}

fn keeps_its_rate() -> Result<(), Failed> {
    let mut qemu = Qemu::boot(&config(), 1)?;
    qemu.wait_until_running()?;
    let (start, first) = (Instant::now(), qemu.header()?.writes()[0]);
    sleep(Duration::from_secs(2));
    let writes = qemu.header()?.writes()[0] - first;
    let rate = writes as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} pages/s");
    // Never more than asked for; less only where the machine is too busy to run the vCPU.
    assert!((10_000.0..30_600.0).contains(&rate), "{rate} pages/s instead of 30000");
    Ok(())
}

fn refuses_what_does_not_fit() -> Result<(), Failed> {
    let mut qemu = Qemu::boot(&WriterConfig { working_set_bytes: MEMORY_BYTES, ..config() }, 1)?;
    let header = qemu.wait_until(|status| status != Status::Booting)?;
    assert!(matches!(header.status(), Status::DoesNotFit { asked_pages: 65536, .. }), "{header:?}");
    assert!(header.status().to_string().contains("256 MiB"), "{}", header.status());
    Ok(())
}

fn wrong_page_is_found() -> Result<(), Failed> {
    let mut qemu = Qemu::boot(&config(), 1)?;
    let header = qemu.wait_until_running()?;
    let frames = header.ranges()[0].guest_address as usize;
    let path = qemu.dump()?;
    let mut dump = fs::read(&path)?;
    // A page of the fill beyond the working set, and the last page of RAM.
    dump[frames + (80 << 20) + 8] ^= 0x10;
    let last = dump.len() - 4096;
    dump[last] = 1;
    fs::write(&path, dump)?;
    match check(&FileMemory::dump(&path, 0)?) {
        Err(CheckError::Mismatch(mismatches)) => {
            assert_eq!(mismatches.pages, 2, "{mismatches}");
            assert_eq!(mismatches.described[0].kind, MismatchKind::BitFlip { bit: 4 });
            assert_eq!(mismatches.described[1].kind, MismatchKind::NotZero);
            Ok(())
        }
        other => Err(format!("the wrong pages were not found: {other:?}").into()),
    }
}

/// A guest in QEMU's microvm. Ends with the value.
struct Qemu {
    child: Child,
    reader: BufReader<UnixStream>,
    directory: TempDir,
}

impl Qemu {
    fn boot(config: &WriterConfig, vcpus: usize) -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let (kernel, socket) = (directory.path().join("guest.elf"), directory.path().join("qmp"));
        fs::write(&kernel, elf(config))?;
        let mut child = Command::new(QEMU)
            .args(["-accel", "kvm", "-cpu", CPU, "-machine", "microvm", "-display", "none", "-serial", "none"])
            .args(["-m", &format!("{}M", MEMORY_BYTES >> 20), "-smp", &vcpus.to_string()])
            .arg("-kernel")
            .arg(&kernel)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        match connect(&socket, &mut child) {
            Ok(stream) => {
                let mut qemu = Self { child, reader: BufReader::new(stream), directory };
                qemu.reader.read_line(&mut String::new())?;
                qemu.execute("qmp_capabilities", json!({}))?;
                Ok(qemu)
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Box<dyn Error>> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}")?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                return Err("QEMU ended".into());
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if answer.get("error").is_some() {
                return Err(format!("{command}: {answer}").into());
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// The header page of the running guest.
    fn header(&mut self) -> Result<HeaderPage, Box<dyn Error>> {
        let path = self.directory.path().join("header");
        self.execute("pmemsave", json!({ "val": 0x10_0000, "size": 4096, "filename": path }))?;
        Ok(Header::new(&FileMemory::dump(&path, 0x10_0000)?)?.snapshot()?)
    }

    fn wait_until_running(&mut self) -> Result<HeaderPage, Box<dyn Error>> {
        let header = self.wait_until(|status| status != Status::Booting)?;
        assert_eq!(header.status(), Status::Running);
        Ok(header)
    }

    fn wait_until(&mut self, reached: impl Fn(Status) -> bool) -> Result<HeaderPage, Box<dyn Error>> {
        let start = Instant::now();
        loop {
            // The page is there once QEMU's firmware has loaded the kernel.
            match self.header() {
                Ok(header) if reached(header.status()) => return Ok(header),
                Err(error) if start.elapsed() > BOOT_LIMIT => return Err(error),
                Ok(header) if start.elapsed() > BOOT_LIMIT => return Err(format!("stuck: {header:?}").into()),
                _ => sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Pauses the guest and dumps all of its memory.
    fn dump(&mut self) -> Result<std::path::PathBuf, Box<dyn Error>> {
        self.execute("stop", json!({}))?;
        let path = self.directory.path().join("memory");
        self.execute("pmemsave", json!({ "val": 0, "size": MEMORY_BYTES, "filename": path }))?;
        Ok(path)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(socket: &Path, child: &mut Child) -> Result<UnixStream, Box<dyn Error>> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > BOOT_LIMIT => return Err(error.into()),
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("{QEMU} ended at once: {status}").into());
        }
        sleep(Duration::from_millis(10));
    }
}
