//! A program of several crates, as a binary: prints what it has linked; with the argument `run` it runs.

use nexus::prelude::*;

nexus::link!(nexus_test_billing, nexus_test_returns, nexus_test_shipping);

#[tokio::main]
async fn main() -> nexus::Result {
    let app = App::discover().name("shop");
    if std::env::args().any(|argument| argument == "run") {
        return nexus::run(app).await;
    }
    println!("{}", serde_json::to_string(&app.describe())?);
    Ok(())
}
