//! What a program pays for nexus when it is built: time, size, and what takes the time.
//!
//! `cargo run --release -p nexus-benches --bin compile-time`
//!
//! The quickstart becomes a package of its own below the build folder, with a build folder of its own, so that nothing
//! is built already. Five hundred events and handlers are checked beside as many types and functions without the macros.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use nexus_benches::{load, median};
use serde::Deserialize;
use serde_json::json;

#[derive(Debug, Parser)]
#[command(about = "What a program pays for nexus when it is built")]
struct Arguments {
    /// How often what is quick is repeated; the clean build is done once.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Events and handlers of the large program.
    #[arg(long, default_value_t = 500)]
    items: u32,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// A package that depends on nexus as a user's does.
struct Package {
    folder: PathBuf,
    /// Shared, so that what they depend on is built once.
    target: PathBuf,
}

impl Package {
    fn new(root: &Path, name: &str, main: &str) -> anyhow::Result<Self> {
        let folder = root.join(name);
        let nexus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nexus");
        fs::create_dir_all(folder.join("src"))?;
        let manifest = format!(
            "[package]\nname = \"{name}\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
             nexus = {{ path = '{}', features = [\"embedded\"] }}\nschemars = \"1.2\"\nserde = {{ version = \"1\", features = [\"derive\"] }}\n\
             sqlx = {{ version = \"0.9\", default-features = false, features = [\"postgres\", \"runtime-tokio\"] }}\n\
             tokio = {{ version = \"1\", features = [\"macros\", \"rt-multi-thread\"] }}\n",
            nexus.display()
        );
        fs::write(folder.join("Cargo.toml"), manifest)?;
        fs::write(folder.join("src/main.rs"), main)?;
        // The versions that nexus itself is tested with.
        fs::copy(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock"),
            folder.join("Cargo.lock"),
        )?;
        let target = root.join("target");
        Ok(Self { folder, target })
    }

    /// Runs cargo and tells how long it took.
    fn cargo(&self, arguments: &[&str]) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let output = Command::new(env!("CARGO"))
            .args(arguments)
            .current_dir(&self.folder)
            .env("CARGO_TARGET_DIR", &self.target)
            .env_remove("RUSTFLAGS")
            .output()?;
        ensure!(
            output.status.success(),
            "cargo {} failed:\n{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(begun.elapsed())
    }

    /// The same after a change of the program alone; the median.
    fn again(&self, arguments: &[&str], runs: u32) -> anyhow::Result<Duration> {
        let main = self.folder.join("src/main.rs");
        let mut took = Vec::new();
        for run in 0..runs.max(1) {
            let mut text = fs::read_to_string(&main)?;
            writeln!(text, "const _: u32 = {run};")?;
            fs::write(&main, text)?;
            took.push(self.cargo(arguments)?);
        }
        Ok(*median(&took, Duration::as_secs_f64))
    }

    fn size(&self, profile: &str) -> anyhow::Result<u64> {
        let name = self.folder.file_name().context("it has a name")?;
        Ok(fs::metadata(self.target.join(profile).join(name))?.len())
    }
}

/// A crate that was compiled, as cargo's own report of timings has it.
#[derive(Debug, Deserialize)]
struct Unit {
    name: String,
    duration: f64,
}

/// What took longest of the build that was done last with `--timings`, and how many units there were.
fn units(target: &Path) -> anyhow::Result<(usize, Vec<Unit>)> {
    let report = fs::read_to_string(target.join("cargo-timings/cargo-timing.html"))?;
    let (_, data) = report
        .split_once("const UNIT_DATA = ")
        .context("cargo's report of timings has its data in it")?;
    let mut units = serde_json::Deserializer::from_str(data).into_iter::<Vec<Unit>>();
    let mut units = units.next().context("the data is a list")??;
    let count = units.len();
    units.sort_by(|one, other| other.duration.total_cmp(&one.duration));
    units.truncate(10);
    Ok((count, units))
}

fn large_program(items: u32, with_macros: bool) -> String {
    let mut text = String::from("use nexus::prelude::*;\n");
    let (event, handler) = if with_macros {
        (", Event", "#[handler]\n")
    } else {
        ("", "")
    };
    for item in 0..items {
        let _ = write!(
            text,
            "#[derive(Serialize, Deserialize, JsonSchema{event})]\npub struct Event{item} {{ pub id: u64, pub name: String }}\n\
             {handler}pub async fn handle_{item}(event: Event{item}) -> nexus::Result {{ let _ = event.id; Ok(()) }}\n"
        );
    }
    let main = if with_macros {
        "#[tokio::main]\nasync fn main() -> nexus::Result { nexus::run(App::discover()).await?; Ok(()) }\n"
    } else {
        "fn main() {}\n"
    };
    text + main
}

fn main() -> anyhow::Result<()> {
    let Arguments { runs, items, json } = Arguments::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/compile-time");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let quickstart = include_str!("../../../examples/quickstart/main.rs");
    let quickstart = Package::new(&root, "quickstart", quickstart)?;
    eprintln!("fetching what it depends on");
    quickstart.cargo(&["fetch"])?;
    eprintln!("building the quickstart from nothing");
    let clean = quickstart.cargo(&["build", "--timings"])?;
    let (count, slowest) = units(&quickstart.target)?;
    let incremental = quickstart.again(&["build"], runs)?;
    let debug_size = quickstart.size("debug")?;
    eprintln!("building it with --release");
    let release = quickstart.cargo(&["build", "--release"])?;
    let release_size = quickstart.size("release")?;
    quickstart.cargo(&["rustc", "--release", "--", "-C", "strip=symbols"])?;
    let stripped_size = quickstart.size("release")?;
    eprintln!("checking {items} events and handlers, and as many without the macros");
    let large = Package::new(&root, "large", &large_program(items, true))?;
    let plain = Package::new(&root, "plain", &large_program(items, false))?;
    large.cargo(&["check"])?;
    plain.cargo(&["check"])?;
    let with_macros = large.again(&["check"], runs)?;
    let without = plain.again(&["check"], runs)?;
    if json {
        let report = json!({
            "bench": "compile-time", "load": load(),
            "clean_seconds": clean.as_secs_f64(), "units": count,
            "slowest": slowest.iter().map(|unit| json!([unit.name, unit.duration])).collect::<Vec<_>>(),
            "incremental_seconds": incremental.as_secs_f64(), "release_seconds": release.as_secs_f64(),
            "bytes": { "debug": debug_size, "release": release_size, "stripped": stripped_size },
            "items": items, "check_seconds": with_macros.as_secs_f64(),
            "check_without_macros_seconds": without.as_secs_f64(),
        });
        println!("{report:#}");
        return Ok(());
    }
    #[expect(clippy::cast_precision_loss, reason = "files are small")]
    let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
    println!("load: {:?}\n", load());
    println!(
        "quickstart, `cargo build` from nothing: {:.0} s, {count} units",
        clean.as_secs_f64()
    );
    println!("  the same with --release: {:.0} s", release.as_secs_f64());
    println!(
        "  after a change of the program: {:.1} s",
        incremental.as_secs_f64()
    );
    println!(
        "  size: {:.1} MiB, with --release {:.1} MiB, stripped {:.1} MiB",
        mib(debug_size),
        mib(release_size),
        mib(stripped_size)
    );
    println!("  what took longest:");
    for Unit { name, duration } in &slowest {
        println!("    {duration:>5.1} s  {name}");
    }
    println!(
        "{items} events and handlers, `cargo check` after a change: {:.1} s; as many types and functions without the macros: {:.1} s",
        with_macros.as_secs_f64(),
        without.as_secs_f64()
    );
    Ok(())
}
