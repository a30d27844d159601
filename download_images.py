"""Fill the photo cache for a sheet, and say what could not be had and why.

    python download_images.py --data_path data.xlsx --image_cache_dir image_cache_new

Photos that are there already are not asked for again, so a run that was stopped goes on where it was. Training itself
never uses the network.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import DownloadOptions
    from ground.commands import start

    start(DownloadOptions, "Fill the photo cache for a sheet.")

from collections import Counter

from loguru import logger
from tqdm import tqdm

from config import DownloadOptions
from sheets.fetch import Fetched, fetch_all, missing_addresses
from sheets.table import write_table


def download(options: DownloadOptions) -> int:
    """Fetch what is missing, write the report, print a summary; returns how many addresses failed."""
    addresses = missing_addresses(options.data_path, options.image_cache_dir, options)
    logger.info(f"{options.data_path}: {len(addresses)} photos are not in {options.image_cache_dir} yet")
    results = []
    with tqdm(total=len(addresses), unit="photo", disable=None, dynamic_ncols=True) as bar:
        for result in fetch_all(addresses, options.image_cache_dir, options):
            results.append(result)
            bar.update()
    failed = [result for result in results if result.reason]
    write_table(options.report_path, [["host", "reason", "address"],
                                      *([result.host, result.reason, result.address] for result in failed)])
    print(host_table(results))
    print(f"{len(results) - len(failed)} photos fetched, {len(failed)} failed"
          + (f": see {options.report_path}" if failed else ""))
    return len(failed)


def host_table(results: list[Fetched], shown: int = 20) -> str:
    """Say for each host, the most failures first, how many photos came and why others did not."""
    came = Counter(result.host for result in results if not result.reason)
    reasons: dict[str, Counter[str]] = {}
    for result in results:
        if result.reason:
            reasons.setdefault(result.host, Counter())[result.reason[:70]] += 1
    hosts = sorted({result.host for result in results}, key=lambda host: -sum(reasons.get(host, Counter()).values()))
    lines = []
    for host in hosts[:shown]:
        of_host = reasons.get(host, Counter())
        lines.append(f"{host}: {came[host]} fetched, {sum(of_host.values())} failed")
        lines += [f"    {count} x {reason}" for reason, count in of_host.most_common(5)]
    if len(hosts) > shown:
        lines.append(f"... and {len(hosts) - shown} more hosts")
    return "\n".join(lines)


def main(options: DownloadOptions) -> int:
    """Download; status 1 when an address failed."""
    return 1 if download(options) else 0
